import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.model.sampling import generate, sample

MASK, VOCABULARY = 4, 5


class Oracle:
    """A model whose prediction of each position is a fixed law, or a given function of the input."""

    config = SimpleNamespace(mask_token_id=MASK)

    def __init__(self, predict):
        self.predict, self.calls = predict, 0

    def __call__(self, input_ids):
        self.calls += 1
        return SimpleNamespace(logits=self.predict(input_ids))


def fixed(law: torch.Tensor) -> Oracle:
    return Oracle(lambda x: law.log().expand(*x.shape, VOCABULARY).clone())


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(batch: int, length: int) -> torch.Tensor:
    x = torch.full((batch, length), MASK)
    x[:, 0] = 0
    return x


LAW = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05])


@given(
    st.integers(1, 12),
    st.sampled_from(["random", "confidence"]),
    st.floats(0, 2),
    st.floats(0.1, 1),
    st.integers(0, 99),
)
def test_every_mask_is_filled_and_nothing_else_changes(steps, order, temperature, top_p, seed):
    x = torch.randint(0, VOCABULARY, (3, 10), generator=rng(seed))
    x[:, 0] = 1
    model = fixed(LAW)
    out = generate(model, x, steps=steps, order=order, temperature=temperature, top_p=top_p, generator=rng(seed))
    assert not (out == MASK).any()
    assert torch.equal(out[x != MASK], x[x != MASK])
    assert model.calls <= steps


def test_a_seed_gives_one_text():
    draw = [generate(fixed(LAW), start(2, 30), steps=5, generator=rng(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_random_order_reveals_one_kth_of_the_masks():
    """Eq. 4 with T equal steps: at step k a masked token is revealed with probability 1/k."""
    steps, length = 5, 40_001
    _, history = generate(fixed(LAW), start(1, length), steps=steps, generator=rng(), return_history=True)
    left = length - 1
    for k, x in zip(range(steps, 0, -1), history):
        now = int((x == MASK).sum())
        assert abs((left - now) / left - 1 / k) < 5 * (1 / k * (1 - 1 / k) / left) ** 0.5 + 1e-9
        left = now
    assert left == 0


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_samples_of_independent_tokens_have_their_law(steps):
    out = generate(fixed(LAW), start(1, 20_001), steps=steps, generator=rng())[0, 1:]
    expected = LAW[:4] / LAW[:4].sum()  # a mask is never drawn
    found = torch.bincount(out, minlength=4) / len(out)
    assert (found - expected).abs().max() < 0.015


def test_many_steps_sample_a_joint_distribution_that_one_step_cannot():
    """Two tokens that are always equal: one at a time gives pairs 00 and 11 alone, at once gives all four."""

    def predict(x):
        logits = torch.full((*x.shape, VOCABULARY), -1e4)
        for row in range(len(x)):
            known = [t for t in x[row, 1:].tolist() if t != MASK]
            for token in (0, 1):
                logits[row, :, token] = 0.0 if not known or known[0] == token else -1e4
        return logits

    def pairs(steps):
        out = generate(Oracle(predict), start(400, 3), steps=steps, generator=rng())
        return Counter(map(tuple, out[:, 1:].tolist()))

    assert set(pairs(64)) <= set(itertools.product((0, 1), repeat=2))
    equal = lambda counts: (counts[0, 0] + counts[1, 1]) / 400  # noqa: E731
    assert equal(pairs(64)) > 0.95 and 0.4 < equal(pairs(1)) < 0.6


def test_most_confident_first():
    """Certainty grows with the position here, so text appears from the end, equally much a step."""

    def predict(x):
        logits = torch.zeros(*x.shape, VOCABULARY)
        logits[..., 2] = torch.arange(x.shape[1]).float()
        return logits

    _, history = generate(
        Oracle(predict), start(1, 9), steps=4, order="confidence", temperature=0, return_history=True
    )  # fmt: skip
    assert [(x[0] == MASK).nonzero().flatten().tolist() for x in history] == [
        [1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4],
        [1, 2],
        [],
    ]


def test_top_p_keeps_the_smallest_set():
    logits = LAW.log().expand(5000, -1)
    assert set(sample(logits, 1.0, 0.5, rng())[0].tolist()) == {0, 1}
    assert set(sample(logits, 1.0, 0.39, rng())[0].tolist()) == {0}
    assert set(sample(logits, 1.0, 1.0, rng())[0].tolist()) == {0, 1, 2, 3, 4}
    _, confidence = sample(logits[:3], 0.0, 1.0, None)
    torch.testing.assert_close(confidence, torch.full((3,), 0.4))


@pytest.mark.parametrize("change", [{"steps": 0}, {"temperature": -1}, {"top_p": 0}, {"order": "left"}])
def test_bad_arguments(change):
    with pytest.raises(ValueError, match="expected steps >= 1"):
        generate(fixed(LAW), start(1, 4), **change)


def test_a_mask_in_front_is_refused_unless_something_predicts_it():
    for diffusion in (None, {}, {"shift": True}):
        model = fixed(LAW)
        model.config = SimpleNamespace(mask_token_id=MASK, diffusion=diffusion)
        with pytest.raises(ValueError, match="put the start token in front"):
            generate(model, torch.full((1, 4), MASK))
    model.config.diffusion = {"shift": False}
    assert not (generate(model, torch.full((1, 4), MASK), generator=rng()) == MASK).any()
