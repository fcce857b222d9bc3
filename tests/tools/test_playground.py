"""The playground without a browser: what it answers, and its pictures."""

import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from common.errors import UserError
from pretrain.model.settings import SamplingSettings
from tools.animation import FOUND, GIVEN, MASK, Film, Frame, Token, legend, render, shade
from tools.decoding import load, settings_of
from tools.playground import Writer, chosen_settings, facts, load_base, main, trouble


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


CONTROLS = {
    "length": 9, "seed": 0, "order": "random", "temperature": 1, "steps": 0, "block_length": 0, "top_k": 0,
    "top_p": 1.0, "min_p": 0, "repetition_penalty": 0, "kl_threshold": 0, "verify_threshold": 0,
    "remasking": 0, "refresh_every": 0, "rule": "none", "level": 0.9, "cache": False,
}  # fmt: skip


def test_controls_left_alone_set_nothing_whatever_the_checkpoint_says(writer):
    plain = settings_of(writer.model, chosen_settings(CONTROLS))
    assert plain == SamplingSettings(order="random", temperature=1.0, top_p=1.0)
    model = SimpleNamespace(
        generation_config=GenerationConfig(threshold=0.9, block_length=2, cache="window", refresh_every=2, steps=3)
    )
    assert settings_of(model, chosen_settings(CONTROLS)) == plain
    more = {"rule": "threshold", "level": 0.6, "verify_threshold": 0.9, "steps": 7.0, "min_p": 0.1}
    assert settings_of(model, chosen_settings(CONTROLS | more)) == SamplingSettings(
        order="random", threshold=0.6, verify_threshold=0.9, steps=7, min_p=0.1, temperature=1.0, top_p=1.0
    )


def test_controls_that_are_empty_or_huge_are_named():
    for name, value, message in (
        ("seed", None, "seed is empty"),
        ("steps", 1e30, "steps is 1e\\+30, expected a number"),
    ):
        with pytest.raises(UserError, match=message):
            chosen_settings(CONTROLS | {name: value})


def test_the_base_writes_by_its_seed_counts_its_tokens_and_stops(tiny_checkpoint, base_dir):
    writer = Writer(*load(str(tiny_checkpoint), device="cpu"), *load_base(str(base_dir("llama")), "cpu"), most=100)

    def write(seed: int, length: int = 12) -> tuple[str, str]:
        *_, last = writer.write_with_base("Once upon", length, seed, {"temperature": 1})
        return last

    first = write(1)
    assert "12 tokens · 12 model calls" in first[1] and write(1)[0] == first[0] != write(2)[0]
    with ThreadPoolExecutor(3) as pool:  # beside others
        texts = list(pool.map(lambda seed: write(seed)[0], [1, 2, 1]))
    assert texts[0] == texts[2] == first[0]
    began = writer.write_with_base("Once", 200, 0, {"temperature": 1})
    next(began)
    began.close()  # the page was closed
    assert writer.base_is_free.acquire(timeout=20), "and what it had begun ends"
    writer.base_is_free.release()
    with pytest.raises(UserError, match="tokens, but the base model takes 256"):
        next(writer.write_with_base("x " * 250, 50, 0, {}))


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
