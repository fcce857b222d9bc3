"""Estimators of likelihoods against the definition: the mean over all orders of finding a target's tokens."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.evaluation.likelihood import EPS, Draws, by_time, draw, estimate, every_mask, random_for

UNBIASED = ("nelbo", "mask_count")


class MadeUp:
    """CE of each token under each set of masked tokens: arbitrary numbers."""

    def __init__(self, length: int, seed: int = 0):
        self.table = np.random.default_rng(seed).gamma(1.0, 2.0, (2**length, length))

    def of(self, masked: np.ndarray) -> float:
        """Summed over the masked tokens."""
        return float(self.table[self.number(masked)][masked].sum())

    @staticmethod
    def number(masked: np.ndarray) -> int:
        return int((2 ** np.arange(len(masked)))[masked].sum())

    def sums(self, draws: Draws) -> np.ndarray:
        return np.array([self.of(masked) for masked in draws.masked])

    def over_all_orders(self, length: int) -> float:
        """The mean over orders of the sum of CE(next token | those before it in the order)."""
        totals = []
        for order in itertools.permutations(range(length)):
            masked = np.ones(length, bool)
            total = 0.0
            for position in order:
                total += self.table[self.number(masked)][position]
                masked[position] = False
            totals.append(total)
        return float(np.mean(totals))


@given(st.integers(1, 5), st.integers(0, 99))
def test_enumeration_is_the_mean_over_all_orders(length, seed):
    made_up = MadeUp(length, seed)
    value, error = estimate(every_mask(length), made_up.sums(every_mask(length)))
    assert value == pytest.approx(made_up.over_all_orders(length), rel=1e-12)
    assert error == 0


@pytest.mark.parametrize("name", UNBIASED)
def test_short_targets_are_enumerated_and_long_ones_drawn(name):
    assert draw(name, 5, 31, random_for(0, [1])).exact and not draw(name, 5, 30, random_for(0, [1])).exact
    assert draw(name, 1, 32, random_for(0, [1])).calls == 1
    long = draw(name, 40, 32, random_for(0, [1]))
    assert long.masked.shape == (32, 40)


@pytest.mark.parametrize("name", UNBIASED)
def test_estimates_are_right_on_average_and_know_their_error(name):
    length, made_up = 6, MadeUp(6)
    runs = [estimate(d, made_up.sums(d)) for d in (draw(name, length, 16, random_for(s, [1])) for s in range(3000))]
    values, errors = np.array(runs).T
    spread = values.std(ddof=1)
    # eps cuts nelbo off at t = 0.001, where this target's loss is 2.5 times its mean: a bias below 0.2%
    assert values.mean() == pytest.approx(made_up.over_all_orders(length), abs=3 * spread / math.sqrt(len(runs)) + 0.02)
    assert 0.9 < math.sqrt((errors**2).mean()) / spread < 1.6


@given(st.integers(6, 50), st.integers(8, 40), st.integers(0, 99))
def test_counts_divide_the_target_evenly(length, draws, seed):
    found = draw("mask_count", length, draws, random_for(seed, [2]))
    if found.exact:
        return
    counts = found.masked.sum(axis=1)
    edges = np.arange(draws + 1) / draws * length
    assert ((counts >= edges[:-1]) & (counts <= np.ceil(edges[1:]))).all() and (counts >= 1).all()
    assert np.allclose(found.weights, length / counts)


def test_times_divide_the_unit_interval_evenly():
    length, draws = 4000, 8
    for name in ("nelbo", "dream", "paper"):
        found = draw(name, length, draws, random_for(3, [2]))
        share = np.sort(found.masked.mean(axis=1))
        for k in range(draws):
            assert k / draws - 0.03 < share[k] < (k + 1) / draws + 0.03, name
    nelbo = draw("nelbo", length, draws, random_for(3, [2]))
    assert np.allclose(nelbo.weights, 1 / nelbo.masked.mean(axis=1), rtol=0.2)
    assert draw("dream", 6, 32, random_for(0, [1])).weights.max() <= 1 / EPS


def test_the_authors_way_by_hand():
    """T grid points; CE over the number masked; a point without masks counts as 0, so short targets win."""
    found = draw("paper", 1, 32, random_for(0, [7]))
    ce = np.full(32, 5.0) * found.masked[:, 0]
    value, _ = estimate(found, ce)
    assert value == pytest.approx(5.0 * found.masked[:, 0].mean())
    assert found.masked[0].all(), "the first grid point is t = 1"
    many = [
        estimate(d, 5.0 * d.masked.sum(axis=1))[0]
        for d in (draw("paper", 9, 32, random_for(s, [7])) for s in range(99))
    ]
    ones = [
        estimate(d, 5.0 * d.masked.sum(axis=1))[0]
        for d in (draw("paper", 1, 32, random_for(s, [7])) for s in range(99))
    ]
    assert np.mean(ones) < 0.6 * 5 and np.mean(many) > 0.85 * 5  # the same CE of each token


def test_masks_depend_on_the_target_and_the_seed_alone():
    a, b = (draw("mask_count", 9, 8, random_for(1, [3, 4])) for _ in range(2))
    assert (a.masked == b.masked).all()
    assert (a.masked != draw("mask_count", 9, 8, random_for(2, [3, 4])).masked).any()
    assert (a.masked != draw("mask_count", 9, 8, random_for(1, [3, 5])).masked).any()


def test_one_draw_has_no_error_and_unknown_names_are_refused():
    drawn = by_time(9, np.array([1.0]), random_for(0, [1]))
    assert math.isnan(estimate(drawn, np.array([1.0]))[1])
    with pytest.raises(ValueError, match="mask_count"):
        draw("elbo", 3, 4, random_for(0, [1]))
