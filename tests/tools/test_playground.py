"""The playground without a browser: what it answers, and its pictures."""

import re

import pytest
import torch

from common.errors import UserError
from tools.animation import FOUND, GIVEN, MASK, Film, Frame, Token, legend, render, shade
from tools.decoding import load
from tools.playground import Writer, chosen_settings, facts, main, trouble


@pytest.fixture(scope="module")
def writer(tiny_checkpoint):
    return Writer(*load(str(tiny_checkpoint), device="cpu"), most=100)


def test_a_film_has_a_frame_for_each_step_and_ends_in_the_text(writer):
    text = "The Fox saw [MASK:5] by the [MASK:2]."
    given = {"order": "entropy", "temperature": 0.7}
    *_, (body, line, film) = writer.write(text, 9, 3, "step", **given)
    assert [frame.missing for frame in film.frames] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert [frame.calls for frame in film.frames] == list(range(8))
    asked = writer.asked(text, 9)
    out = writer.model.diffusion_generate(torch.tensor([asked.ids]), generator=asked.generator(3), **given)
    shown = "".join(token.piece for token in film.frames[-1].tokens)
    assert shown == writer.tokenizer.decode(out[0], skip_special_tokens=True)
    assert sorted(token.step for token in film.frames[-1].tokens if token.kind == FOUND) == [1, 2, 3, 4, 5, 6, 7]
    assert all(sum(token.new for token in frame.tokens) == 1 for frame in film.frames[1:])
    assert "7 tokens · 7 model calls (NFE) · 1.00 tokens a call" in line and 'data-masks="0"' in body


def test_a_text_without_a_gap_is_continued(writer):
    *_, (_, _, film) = writer.write("Once", 4, 0, "step", temperature=0.0)
    assert film.frames[0].missing == 4 and film.frames[-1].found == 4
    *_, (_, _, film) = writer.write("", 4, 0, "step")
    assert film.frames[-1].found == 4


def test_all_text_is_escaped():
    tokens = [Token("<script>", GIVEN), Token("░", MASK), Token("&\n<i>", FOUND, 0.5, 1, True)]
    body = render(Frame(tokens, 1), "confidence", 3)
    assert "<script>" not in body and "&lt;script&gt;" in body and "&amp;<br>&lt;i&gt;" in body
    assert 'data-masks="1"' in body and 'data-found="1"' in body and 'title="probability 0.50, step 1"' in body
    assert "&lt;x&gt;" in trouble("<x>") and "unsure" in legend("confidence") and "first" in legend("step")


def test_shades_go_from_orange_over_white_to_blue():
    lightness = [int(re.findall(r"(\d+)%\)", shade(k / 10))[0]) for k in range(11)]
    assert lightness[5] == 100 and lightness == lightness[::-1] and lightness[:6] == sorted(lightness[:6])
    assert shade(0).startswith("hsl(28 ") and shade(1).startswith("hsl(210 ") and shade(-3) == shade(0)


def test_controls_left_alone_set_nothing():
    values = {
        "order": "random", "temperature": 1.0, "steps": 0, "block_length": 0, "top_k": 0, "top_p": 1.0, "remasking": 0,
        "rule": "none", "level": 0.9, "verify_threshold": 0, "cache": False,
    }  # fmt: skip
    assert chosen_settings(values) == {"order": "random", "temperature": 1.0, "top_p": 1.0}
    values |= {"rule": "threshold", "level": 0.6, "verify_threshold": 0.9, "steps": 7.0}
    assert chosen_settings(values) | {} == {
        "order": "random", "temperature": 1.0, "top_p": 1.0, "steps": 7, "threshold": 0.6, "verify_threshold": 0.9,
    }  # fmt: skip


def test_facts_say_what_it_took():
    assert "40 tokens · 10 model calls (NFE) · 4.00 tokens a call · 20.0 tokens/s" in facts(40, 10, 2.0)
    assert "0 tokens" in facts(0, 0, 0.0)


@pytest.mark.parametrize(
    ("text", "message"), [("[MASK:101]", "more than this page writes"), ("[MASK:0]", "nothing to")]
)
def test_what_cannot_be_written_is_refused(writer, text, message):
    with pytest.raises(UserError, match=message):
        next(writer.write(text, 9, 0, "step"))


def test_a_base_that_is_not_there_is_one_line(tiny_checkpoint, capsys):
    pytest.importorskip("gradio")
    assert main([str(tiny_checkpoint), "--base", "/nowhere"]) == 2
    assert main([str(tiny_checkpoint), "--max_tokens", "0"]) == 2
    error = capsys.readouterr().err
    assert "--base /nowhere cannot be loaded" in error and "--max_tokens is 0" in error


def test_the_film_of_a_text_with_given_masks_knows_them(writer):
    film = Film([5, writer.model.config.mask_token_id], writer.tokenizer, writer.model.config.mask_token_id)
    assert [token.kind for token in film.frames[0].tokens] == [GIVEN, MASK]
