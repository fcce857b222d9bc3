"""How tokens are drawn: filters of transformers, one uniform number a token."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from known_laws import LAW, VOCABULARY, Oracle, fixed, probability_of, rng, run, start
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pretrain.model.drawing import invert, warpers
from pretrain.model.generation import generate


@pytest.mark.parametrize("seed", range(5))
def test_temperature_and_filters_are_those_of_transformers(seed):
    """The law of what is drawn is that of transformers' processors, applied to what the model says."""
    logits = torch.randn(1, 9, generator=rng(seed)) * 2
    named = {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.7}
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.7),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(6),
            TopPLogitsWarper(0.8),
            MinPLogitsWarper(0.1),
        ]
    )
    given = torch.tensor([[1, 3]])
    expected = theirs(given, logits.clone()).softmax(-1)[0]

    rows = 20_000
    x = torch.tensor([[1, 3, 8]]).repeat(rows, 1)

    class Said(Oracle):
        def __call__(self, input_ids, logits_at, attention_mask=None):
            return SimpleNamespace(logits=torch.nn.functional.pad(logits, (0, 1)).expand(len(input_ids), -1).clone())

    model = Said(None)
    model.config.mask_token_id = 9
    x[:, 2] = 9
    out = run(model, x, generator=rng(seed), **named).sequences[:, 2]
    assert probability_of(torch.bincount(out, minlength=9), expected * rows) > 1e-4
    assert len(warpers(**named)) == 5 and len(warpers()) == 0
    assert len(warpers(0.0, top_k=5, repetition_penalty=1.2)) == 1, "the best token needs no filter but the penalty"


def test_a_repetition_penalty_knows_given_and_found_tokens_but_no_masks():
    """Greedy, strong penalty: every token appears once before any twice."""
    x = start(1, 4)
    out = run(fixed(LAW), x, order="left_to_right", temperature=0, repetition_penalty=100.0).sequences
    assert sorted(out[0].tolist()) == [0, 1, 2, 3]


def test_confidence_is_that_of_the_model_before_temperature():
    out = run(fixed(LAW), start(1, 400), temperature=3.0, top_k=2, order="left_to_right")
    law = LAW[:4] / LAW[:4].sum()
    torch.testing.assert_close(out.confidence[0, 1:], law[out.sequences[0, 1:]])
    assert set(out.sequences[0, 1:].tolist()) == {0, 1}


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=6), st.floats(0, 1, exclude_max=True))
def test_inversion_takes_the_token_at_which_the_cumulative_probability_passes(values, uniform):
    logits = torch.tensor([values])
    cumulative = logits.double().softmax(-1).cumsum(-1)[0]
    token = int(invert(logits, torch.tensor([uniform], dtype=torch.float64)))
    assert cumulative[token] >= uniform - 1e-6 and (token == 0 or cumulative[token - 1] <= uniform + 1e-6)
    logits[0, 0] = logits[0, -1] = -torch.inf
    if len(values) > 2:
        for extreme in (0.0, 1 - 2**-53):
            assert 0 < int(invert(logits, torch.tensor([extreme], dtype=torch.float64))) < len(values) - 1


def test_what_is_not_finite_is_said():
    for bad in (float("nan"), float("inf")):
        for temperature in (0, 1):
            with pytest.raises(ValueError, match="predictions are not finite"):
                run(
                    Oracle(lambda x, bad=bad: torch.full((*x.shape, VOCABULARY), bad)),
                    start(1, 4),
                    temperature=temperature,
                )


def test_a_seed_gives_one_text():
    draw = [run(fixed(LAW), start(2, 30), steps=5, generator=rng(seed)).sequences for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert not torch.equal(draw[0][0], draw[0][1]), "rows have seeds of their own"
    torch.manual_seed(5)
    first = generate(fixed(LAW), start(1, 30))
    torch.manual_seed(5)
    assert torch.equal(first, generate(fixed(LAW), start(1, 30)))
