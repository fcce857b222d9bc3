"""`diffusion_generate`: prompts, defaults, ends, streamers, compiled models."""

import re

import pytest
import torch
from known_laws import LAW, fixed
from tiny_models import GAPS, MASK, PROMPTS, made, padded, rng
from transformers import GenerationConfig, TextDiffusionStreamer

from pretrain.model.generation import append_masks, decoding_arguments


def test_masks_are_appended_after_each_rows_last_token():
    ids = torch.tensor([[7, 7, 1, 2], [1, 2, 7, 7], [1, 2, 3, 5]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    out, real = append_masks(ids, mask, 2, MASK)
    assert real.tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert [[t for t, r in zip(*row) if r] for row in zip(out.tolist(), real.tolist())] == [
        [1, 2, MASK, MASK],
        [1, 2, MASK, MASK],
        [1, 2, 3, 5, MASK, MASK],
    ]
    out, real = append_masks(ids[2:], None, 1, MASK)
    assert real is None and out.tolist() == [[1, 2, 3, 5, MASK]]


def test_padding_does_not_count_towards_the_limit():
    model = fixed(LAW, max_position_embeddings=8)
    ids, real = torch.zeros(2, 8, dtype=torch.long), torch.tensor([[1] * 3 + [0] * 5, [1] * 6 + [0] * 2])
    assert decoding_arguments(model, ids, real, max_new_tokens=2)["input_ids"].shape == (2, 10)
    with pytest.raises(ValueError, match="9 tokens with the masks, but the model takes 8"):
        decoding_arguments(model, ids, real, max_new_tokens=3)


def test_unconditional_text_begins_with_the_start_token(model):
    out = model.diffusion_generate(max_new_tokens=6, generator=rng(), eos_token_id=-1)
    assert out.shape == (1, 7) and out[0, 0] == model.config.bos_token_id and not (out == MASK).any()
    ids, real = padded(PROMPTS, "right")
    out = model.diffusion_generate(ids, attention_mask=real, max_new_tokens=4, generator=[rng(k) for k in range(3)])
    alone = model.diffusion_generate(torch.tensor([PROMPTS[1]]), max_new_tokens=4, generator=[rng(1)])
    assert torch.equal(out[1, :6], alone[0])


def test_the_generation_config_gives_the_defaults(model):

    ids = torch.tensor([GAPS[2]])
    call = {"return_dict_in_generate": True, "eos_token_id": -1}
    torch.manual_seed(0)
    plain = model.diffusion_generate(ids, order="left_to_right", block_length=2, temperature=0, **call)
    config = GenerationConfig(order="left_to_right", block_length=2, do_sample=False, eos_token_id=3)
    assert torch.equal(plain.step_of, model.diffusion_generate(ids, generation_config=config, **call).step_of)
    greedy = model.diffusion_generate(ids, order="left_to_right", do_sample=False, **call)
    assert torch.equal(plain.sequences, greedy.sequences)
    arguments = decoding_arguments(model, ids, generation_config=config)
    assert arguments["eos_token_id"] == 3 and decoding_arguments(model, ids)["eos_token_id"] == 0
    assert decoding_arguments(model, ids, eos_token_id=-1)["eos_token_id"] == -1
    named, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    assert decoding_arguments(model, ids)["eos_token_id"] == model.config.eos_token_id == 0
    model.generation_config.eos_token_id = named
    config.max_new_tokens = 5
    assert decoding_arguments(model, generation_config=config)["input_ids"].shape == (1, 6)
    assert decoding_arguments(model, ids, generation_config=config)["input_ids"].shape == ids.shape


class Recorder:
    """What a streamer is told; `first` is what it takes for the prompt."""

    def __init__(self, drafts: bool = True):
        self.said, self.drafts, self.ended = [], [], False
        if drafts:
            self.put_draft = lambda tokens: self.drafts.append(tokens.tolist())

    def put(self, tokens):
        assert not self.ended
        self.said.append(tokens.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("settings", [{"order": "entropy"}, {"order": "left_to_right"}, {"remasking": 0.5, "steps": 9}])
def test_a_streamer_gets_each_token_once_from_the_left(model, settings):
    row = GAPS[1]
    recorder = Recorder()
    out = model.diffusion_generate(torch.tensor([row]), streamer=recorder, generator=rng(), **settings)
    assert recorder.ended and [t for part in recorder.said for t in part] == out[0].tolist()
    assert recorder.said[0] == row[: row.index(MASK)], "the prompt comes first, and alone"
    assert recorder.drafts and all(len(draft) <= len(row) for draft in recorder.drafts)
    if settings.get("remasking"):
        assert len(recorder.said) == 2, "what may be taken back is not said"
    silent = Recorder(drafts=False)
    again = model.diffusion_generate(torch.tensor([row]), streamer=silent, generator=rng(), **settings)
    assert torch.equal(again, out) and silent.said == recorder.said
    ids, real = padded([row, row + [5] * 4], "right", 7)
    padding = Recorder()
    model.diffusion_generate(ids[:1], attention_mask=real[:1], streamer=padding, generator=rng(), **settings)
    assert padding.said == recorder.said and padding.drafts == recorder.drafts, "padding is not said"
    with pytest.raises(ValueError, match="a streamer shows one row, and input_ids has 2"):
        model.diffusion_generate(torch.tensor([row, row]), streamer=recorder)


def test_the_streamer_of_transformers_prints_the_text(model, tokenizer, capsys):

    ids = torch.tensor([[*tokenizer("The Fox saw a")["input_ids"], *[MASK] * 5]])
    streamer = TextDiffusionStreamer(tokenizer, skip_special_tokens=True)
    out = model.diffusion_generate(ids, streamer=streamer, generator=rng(), eos_token_id=-1)
    printed = capsys.readouterr().out
    assert "\033[33m" in printed, "drafts are yellow"
    plain = re.sub(r"\0337.*?\0338\033\[J", "", printed, flags=re.DOTALL)
    assert plain.strip() == tokenizer.decode(out[0], skip_special_tokens=True).strip()


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_text_and_keeps_its_shapes():
    """No more than three kinds of input: full passes without and with what is stored, and windows."""
    model = made("llama")
    before = set(model.state_dict())
    settings = {"order": "entropy", "temperature": 0, "block_length": 3, "eos_token_id": -1}
    two, one = torch.tensor([[5, 9, 33, *[MASK] * 7], [5, 9, *[MASK] * 2, 1, 2, 3, 4, 5, 6]]), [[5, 9, 33, *[MASK] * 7]]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for ids, extra in ((two, {}), (torch.tensor(one), {"cache": "window"})):
            plain = made("llama").diffusion_generate(ids, **settings, **extra)
            assert torch.equal(plain, model.diffusion_generate(ids, compile=True, **settings, **extra))
            torch._dynamo.reset()
    assert set(model.state_dict()) == before
    with pytest.raises(ValueError, match="compile with a cache is for one text at a time"):
        model.diffusion_generate(two, compile=True, cache="window")
