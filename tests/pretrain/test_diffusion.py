import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import OptimizerConfig
from pretrain.diffusion import (
    annealed_width,
    annealing_progress,
    corrupt,
    loss_weights,
    maskable_positions,
    sample_time,
)
from pretrain.optimization import learning_rate, parameter_groups

MASK = 7


@given(st.floats(0.01, 1.0), st.integers(0, 10_000))
def test_corrupt_masks_each_maskable_token_with_probability_t(t, seed):
    rng = np.random.default_rng(seed)
    x0, maskable = rng.integers(0, 20, 4000), rng.random(4000) < 0.7
    xt, masked = corrupt(x0, maskable, np.float64(t), rng.random(4000), MASK)
    assert (xt[masked] == MASK).all() and (xt[~masked] == x0[~masked]).all()
    assert not masked[~maskable].any()
    expected, count = t * maskable.sum(), maskable.sum()
    assert abs(masked.sum() - expected) < 6 * math.sqrt(count * t * (1 - t)) + 1


def test_corrupt_is_the_same_on_tensors_and_arrays():
    rng = np.random.default_rng(0)
    x0, u, t = rng.integers(0, 20, (3, 50)), rng.random((3, 50)), rng.random(3)
    maskable = np.ones((3, 50), dtype=bool)
    arrays = corrupt(x0, maskable, t, u, MASK)
    tensors = corrupt(*(torch.from_numpy(a) for a in (x0, maskable, t, u)), MASK)
    for array, tensor in zip(arrays, tensors):
        np.testing.assert_array_equal(array, tensor.numpy())


def test_a_mask_id_in_the_data_is_not_masked():
    """The authors' code finds masked positions by comparing ids; here the noise decides."""
    x0 = np.full(100, MASK)
    _, masked = corrupt(x0, np.ones(100, dtype=bool), np.float64(0.3), np.linspace(0, 1, 100), MASK)
    assert masked.sum() == 30


def test_time_lies_between_eps_and_one():
    u = torch.linspace(0, 1, 11)
    t = sample_time(u, 1e-3)
    torch.testing.assert_close(t, (1 - 1e-3) * u + 1e-3)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_what_nothing_predicts_is_never_masked(lengths):
    lengths = np.array(lengths)
    shared, isolated = maskable_positions(lengths, False), maskable_positions(lengths, True)
    assert np.flatnonzero(~shared).tolist() == [0]
    assert np.flatnonzero(~isolated).tolist() == [0, *np.cumsum(lengths)[:-1].tolist()]


def test_loss_is_the_authors_objective():
    """Their train.py, written anew: shift, 1/t, mean over masked tokens, from full logits."""
    generator = torch.Generator().manual_seed(0)
    batch, length, vocabulary = 4, 33, 50
    x0 = torch.randint(0, vocabulary - 1, (batch, length), generator=generator)
    logits = torch.randn(batch, length, vocabulary, generator=generator, dtype=torch.float64)
    t = sample_time(torch.rand(batch, generator=generator, dtype=torch.float64))
    u = torch.rand(batch, length, generator=generator, dtype=torch.float64)
    maskable = torch.ones(batch, length, dtype=torch.bool)
    maskable[:, 0] = False
    _, masked = corrupt(x0, maskable, t, u, vocabulary - 1)

    # theirs
    loss_mask = masked[:, 1:]
    loss = torch.nn.CrossEntropyLoss(reduction="none")(
        logits[:, :-1].reshape(-1, vocabulary), x0[:, 1:].reshape(-1)
    ).reshape(batch, -1)
    loss = loss.masked_fill(~loss_mask, 0)
    theirs = (torch.reciprocal(t)[:, None] * loss).sum() / loss_mask.sum()

    # ours: only masked positions, each with its time
    rows, positions = masked.nonzero(as_tuple=True)
    nll = -F.log_softmax(logits[rows, positions - 1], -1).gather(1, x0[rows, positions][:, None])[:, 0]
    ours = (loss_weights(t[rows], float(masked.sum())) * nll).sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


def test_nelbo_of_a_known_distribution_is_its_entropy():
    """Independent tokens of a known law, predicted perfectly: E[(1/t) nll] over maskable tokens is the entropy."""
    law = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    entropy = -(law * law.log()).sum().item()
    generator = torch.Generator().manual_seed(1)
    rows, length = 4000, 64
    x0 = torch.multinomial(law, rows * length, replacement=True, generator=generator).view(rows, length)
    t = sample_time(torch.rand(rows, generator=generator, dtype=torch.float64))
    u = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    _, masked = corrupt(x0, torch.ones_like(x0, dtype=torch.bool), t, u, 4)
    row, _ = masked.nonzero(as_tuple=True)
    nelbo = (loss_weights(t[row], rows * length) * -law.log()[x0[masked]]).sum().item()
    assert nelbo == pytest.approx(entropy, rel=0.02)


def test_annealing_is_linear_then_full():
    ratios = [annealing_progress(step, 10) for step in range(15)]
    np.testing.assert_allclose(ratios[:10], np.arange(1, 11) / 10)
    assert ratios[9:] == [1.0] * 6
    assert annealing_progress(0, 0) == 1.0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "stepwise"])
def test_annealing_schedules_grow_from_causal_to_full(schedule):
    progress = [annealing_progress(step, 40, schedule, stages=4) for step in range(50)]
    assert progress == sorted(progress) and 0 < progress[0] <= 0.25 and progress[39:] == [1.0] * 11
    if schedule == "stepwise":
        assert sorted(set(progress)) == [0.25, 0.5, 0.75, 1.0]
    for form, causal in (("window", 0), ("block", 1)):
        widths = [annealed_width(form, p, 100) for p in (0, *progress)]
        assert widths == sorted(widths) and widths[0] == causal
        assert widths[-1] == {"window": 99, "block": 100}[form]
    assert {annealed_width("block", p / 50, 100) for p in range(50)} == {1, 2, 4, 8, 16, 32, 64, 100}


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_learning_rate(schedule):
    config = OptimizerConfig(lr=2.0, schedule=schedule, warmup_steps=5, min_lr_ratio=0.1, decay_fraction=0.2)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0])
    assert max(rates) == 2.0 and all(a >= b for a, b in itertools.pairwise(rates[5:]))
    final = {"cosine": 0.2, "constant": 2.0, "wsd": 0.2}[schedule]
    assert learning_rate(100, 100, config) == pytest.approx(final)
    if schedule == "cosine":
        halfway = 5 + 95 / 2
        assert learning_rate(halfway, 100, config) == pytest.approx(1.1)
    if schedule == "wsd":
        assert rates[5:80] == [2.0] * 75


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    decay, rest = parameter_groups(model, 0.1)
    assert decay["weight_decay"] == 0.1 and {p.ndim for p in decay["params"]} == {2}
    assert rest["weight_decay"] == 0.0 and {p.ndim for p in rest["params"]} == {1}
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))
