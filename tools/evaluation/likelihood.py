"""Estimators of a target's likelihood under a masked diffusion model, as pure functions.

A target x of L tokens has no likelihood that one model call gives. Each estimator masks parts of it several times
("draws"), sums the cross-entropy CE of the masked tokens given all others, and weights it:

    nelbo       Eq. 7 of arXiv 2410.17891: t stratified over (eps, 1], each token masked with probability t, weight 1/t
    mask_count  LLaDA's, arXiv 2502.09992: l stratified over 1 … L, exactly l tokens masked, weight L/l
    dream       Dream's: t evenly spaced over (eps, 1], an end-of-text token after the target that is never masked
    paper       the authors' evaluation scripts: t = T/T … 1/T, CE divided by the number of masked tokens, 0 where
                there are none. No likelihood: a mean CE, in which short targets win

nelbo and mask_count estimate the same negative evidence lower bound, in nats a target. It is a sum over the 2^L - 1
ways to mask something, so a short target needs no drawing: where all of them are no more than the draws, they are
enumerated and the value is exact.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LIKELIHOODS = ("nelbo", "mask_count", "dream", "paper")
DEFAULT = "mask_count"  # unbiased, and of the lowest variance at equal model calls: benchmarks/likelihoods.py
DRAWS = 32
EPS = 1e-3  # smallest t of nelbo and dream: without it the variance of 1/t is infinite


@dataclass(frozen=True)
class Draws:
    """What to mask. The estimate is the mean over draws of `weights` · CE summed over the masked tokens."""

    masked: np.ndarray  # (K, L) bool
    weights: np.ndarray  # (K,) float64
    exact: bool = False  # all ways to mask something, each once

    @property
    def calls(self) -> int:
        """Rows that a model must read: draws that mask nothing need none."""
        return int(self.masked.any(axis=1).sum())


@dataclass(frozen=True)
class Score:
    """A target's score: the higher, the likelier. `value` is in nats; it bounds the log-likelihood from below."""

    value: float
    stderr: float  # of value, by the draws; 0 where it is exact
    tokens: int  # of the target
    is_greedy: bool  # whether greedy decoding gives the target


def random_for(seed: int, target: Sequence[int]) -> np.random.Generator:
    """Random numbers of a target: the same in any batch, and after any context.

    So two contexts are compared under the same masks.
    """
    key = hashlib.sha256(f"{seed}\n{list(target)}".encode()).digest()
    return np.random.default_rng(int.from_bytes(key[:16], "little"))


def draw(name: str, length: int, draws: int, random: np.random.Generator) -> Draws:
    """The draws of the estimator `name` for a target of `length` tokens."""
    if name in ("nelbo", "mask_count") and 2**length - 1 <= draws:
        return every_mask(length)
    if name == "mask_count":
        return by_count(length, draws, random)
    if name == "nelbo":
        t = (np.arange(1, draws + 1) - random.random(draws)) / draws
        return by_time(length, EPS + (1 - EPS) * t, random)
    if name == "dream":
        t = (random.random() + np.arange(draws) / draws) % 1
        return by_time(length, EPS + (1 - EPS) * np.sort(t), random)
    if name == "paper":
        found = by_time(length, np.arange(draws, 0, -1) / draws, random)
        return Draws(found.masked, 1 / found.masked.sum(axis=1).clip(min=1))
    raise ValueError(f"likelihood is {name!r}, expected one of {', '.join(LIKELIHOODS)}")


def every_mask(length: int) -> Draws:
    """All 2^L - 1 ways to mask something: a way with l masks counts 1 / (l · C(L, l)).

    That is ∫ (1/t) t^l (1 - t)^(L - l) dt over (0, 1), and 1/L · L/l · 1/C(L, l).
    """
    ways = np.arange(1, 2**length)
    masked = (ways[:, None] >> np.arange(length)) % 2 == 1
    counts = masked.sum(axis=1)
    weights = np.array([1 / (n * math.comb(length, n)) for n in counts.tolist()])
    return Draws(masked, weights * len(ways), exact=True)


def by_count(length: int, draws: int, random: np.random.Generator) -> Draws:
    """Exactly l tokens masked, l in the k-th of as many equal parts of 1 … L as there are draws; weight L/l."""
    counts = np.ceil((np.arange(1, draws + 1) - random.random(draws)) / draws * length).clip(1, length)
    places = random.random((draws, length)).argsort(axis=1).argsort(axis=1)
    return Draws(places < counts[:, None], length / counts)


def by_time(length: int, t: np.ndarray, random: np.random.Generator) -> Draws:
    """Each token masked with probability `t` (K,), independently; weight 1/t."""
    return Draws(random.random((len(t), length)) < t[:, None], 1 / t)


def estimate(draws: Draws, ce: np.ndarray) -> tuple[float, float]:
    """(mean, standard error) of the weighted draws; `ce` (K,): the CE summed over the masked tokens of each.

    Draws lie in strata, of which neighbours are alike: the error comes from differences of neighbours. It counts what
    their strata differ by as noise, so it is a little too large.
    """
    values = draws.weights * ce
    mean = float(values.mean())
    count = len(values)
    if draws.exact:
        return mean, 0.0
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(float((np.diff(values) ** 2).sum()) / (2 * count * (count - 1)))
