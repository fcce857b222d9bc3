"""The arguments of decoding: what is refused, what stands for what, and what gives way to what."""

import numpy as np
import pytest
import torch
from known_laws import LAW, MASK, fixed, rng, run, start
from transformers import GenerationConfig

from pretrain.model.generation import decoding_arguments, generate, settings_from
from pretrain.model.sampling import states
from pretrain.model.settings import SamplingSettings

BAD = [
    ({"steps": 0}, "steps is 0, expected a number of steps from 1 on"),
    ({"steps": 2.5}, "steps is 2.5"),
    ({"temperature": -1}, "temperature is -1, expected 0 or more"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_p": 0}, "top_p is 0, expected a share above 0"),
    ({"top_k": -3}, "top_k is -3"),
    ({"order": "left"}, "order is 'left', expected random, confidence, margin, entropy, left_to_right"),
    ({"block_length": 0}, "block_length is 0"),
    ({"threshold": 1.5}, "threshold is 1.5, expected a probability"),
    ({"threshold": 0.9, "factor": 1.0}, "threshold and factor each say how many"),
    ({"kl_threshold": 0.1}, "kl_threshold goes with a threshold"),
    ({"verify_threshold": 0.9}, "verify_threshold goes with a threshold"),
    ({"threshold": 0.5, "verify_threshold": 0.9, "cache": "window"}, "does not go with a cache"),
    ({"remasking": 1.0}, "remasking is 1.0"),
    ({"cache": "prefix"}, "cache is 'prefix', expected None or 'window'"),
    ({"refresh_every": 3}, "refresh_every is for a cache"),
    ({"compile": 1}, "compile is 1"),
    ({"compile": True, "threshold": 0.5, "verify_threshold": 0.9}, "compile wants inputs that keep their shape"),
    ({"threshold": 0.5, "verify_threshold": 0.9, "remasking": 0.5}, "does not go with remasking"),
    ({"threshold": 0.5, "verify_threshold": 0.9, "kl_threshold": 0.5}, "do not go together"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        SamplingSettings(**change)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        decoding_arguments(fixed(LAW), start(1, 4), **change)


def test_what_each_setting_stands_for():
    """The order where none is given, and what a step may know before it asks."""
    orders = [({}, "random"), ({"threshold": 0.9}, "confidence"), ({"factor": 1.0}, "confidence")]
    orders += [({"entropy_bound": 1.0}, "entropy"), ({"threshold": 0.9, "order": "margin"}, "margin")]
    for chosen, order in orders:
        assert SamplingSettings(**chosen).by == order
    for chosen in ({}, {"order": "left_to_right"}, {"remasking": 0.1}):
        assert SamplingSettings(**chosen).blind
    for chosen in ({"order": "entropy"}, *({"order": "random", name: 1.0} for name in ("threshold", "factor"))):
        assert not SamplingSettings(**chosen).blind
    assert not SamplingSettings(order="left_to_right", entropy_bound=1.0).blind
    for chosen in ({"order": "confidence"}, {"threshold": 0.9, "order": "entropy"}, {"factor": 1.0, "order": "random"}):
        assert not SamplingSettings(**chosen).draws_last


def test_unknown_arguments_and_shapes_are_refused():
    model = fixed(LAW, max_position_embeddings=8)
    with pytest.raises(TypeError, match="takes no num_beams, stepz"):
        decoding_arguments(model, start(1, 4), num_beams=4, stepz=3)
    with pytest.raises(ValueError, match="9 tokens with the masks, but the model takes 8"):
        decoding_arguments(model, start(1, 4), max_new_tokens=5)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        decoding_arguments(model, start(1, 4), attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \(rows, tokens\)"):
        decoding_arguments(model, start(1, 4)[0])
    with pytest.raises(ValueError, match="needs input_ids with masks, or max_new_tokens"):
        decoding_arguments(model)
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        list(states(model, start(3, 4), generator=[rng(), rng()]))


def test_odd_but_good_arguments():
    """Numbers of numpy, ids as tensors, whole temperatures, more steps than a long can count, nothing at all."""

    x = start(2, 6)
    plain = run(fixed(LAW), x, temperature=2.0, order="entropy")
    for ends in (torch.tensor(-1), torch.tensor([-1]), np.int64(-1), [-1], -1, None):
        out = run(fixed(LAW), x, temperature=np.int64(2), order="entropy", steps=2**62, eos=ends)
        assert torch.equal(out.sequences, plain.sequences) and torch.equal(out.nfe, plain.nfe)
    assert run(fixed(LAW), x, repetition_penalty=2, temperature=2, top_k=np.int64(3)).sequences.shape == x.shape
    masks = torch.tensor([[MASK, MASK, 0, 1]])
    assert torch.equal(generate(fixed(LAW), masks, torch.tensor([[0, 0, 1, 1]])), masks), "masks in padding are none"
    for shape in ((0, 4), (2, 0)):
        assert generate(fixed(LAW), torch.zeros(shape, dtype=torch.long)).shape == shape


def test_a_rule_that_is_given_replaces_the_rules_of_the_defaults():

    defaults = GenerationConfig(
        threshold=0.9, verify_threshold=0.8, block_length=4, temperature=0.5, do_sample=True, top_p=0.9
    )
    assert settings_from(defaults, {}) == SamplingSettings(
        threshold=0.9, verify_threshold=0.8, block_length=4, temperature=0.5, top_p=0.9
    )
    kept = {"block_length": 4, "temperature": 0.5, "top_p": 0.9}
    assert settings_from(defaults, {"order": "random"}) == SamplingSettings(order="random", **kept)
    assert settings_from(defaults, {"factor": 1.0}) == SamplingSettings(factor=1.0, **kept)
    assert settings_from(defaults, {"threshold": None}) == SamplingSettings(**kept)
    assert settings_from(defaults, {"block_length": None, "temperature": None}).block_length is None
    cached = GenerationConfig(cache="window", refresh_every=3)
    assert settings_from(cached, {"cache": None}) == SamplingSettings()
    assert settings_from(cached, {"refresh_every": 5}) == SamplingSettings(cache="window", refresh_every=5)
    assert settings_from(cached, {"refresh_every": None}) == SamplingSettings(cache="window")
    calm = GenerationConfig(threshold=0.9, kl_threshold=0.1)
    assert settings_from(calm, {"order": "entropy"}) == SamplingSettings(order="entropy")
    greedy = GenerationConfig(do_sample=False)
    assert settings_from(greedy, {}).temperature == 0 and settings_from(greedy, {"temperature": 0.5}).temperature == 0.5
    assert settings_from(greedy, {}, do_sample=True).temperature == 1
    assert settings_from(None, {"compile": None, "remasking": None}) == SamplingSettings()


def test_unconditional_text_begins_with_the_start_token_that_the_model_names():
    model = fixed(LAW, diffusion={"start_token_id": 2}, bos_token_id=1)
    model.device = "cpu"
    assert decoding_arguments(model, max_new_tokens=3)["input_ids"].tolist() == [[2, MASK, MASK, MASK]]
    del model.config.diffusion["start_token_id"]
    assert decoding_arguments(model, max_new_tokens=3)["input_ids"].tolist() == [[1, MASK, MASK, MASK]]
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match="no start token; begin with a token of your own"):
        decoding_arguments(model, max_new_tokens=3)
