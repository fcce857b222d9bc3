"""Which row comes when: the n-th row of a run is a pure function of (seed, n), whoever asks for it and when.

    n ──mixture──▶ source, j ──epochs──▶ row of that source

So the data state is one integer; ranks, accumulation and restarts need no code of their own.
"""

from fractions import Fraction
from math import lcm
from pathlib import Path

import numpy as np

from common.errors import UserError
from data_prep.shards import Manifest, ShardedRows

# What a random stream is for; with (seed, n) it names the stream, so no two uses share one.
NOISE, ORDER, VALIDATION = range(3)
LONGEST_PATTERN = 1_000_000


def stream(seed: int, n: int, purpose: int) -> np.random.Generator:
    """Philox keyed by the pair (seed, n): with a sum, neighbouring seeds would share streams."""
    return np.random.Generator(np.random.Philox(key=[seed, n], counter=[0, 0, 0, purpose]))


def mixture_pattern(weights: list[float]) -> np.ndarray:
    """(P,) source index of each position of a period; every prefix has each source within 1 of its share.

    Tijdeman's rule for the chairman assignment problem: of the sources whose share allows one more,
    the one whose next is due first. Weights are read as the decimals they are written as, so the
    period is their common denominator. Raises UserError for weights whose period would be longer
    than a million.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = lcm(*(share.denominator for share in shares))
    if period > LONGEST_PATTERN:
        raise UserError(f"mixture weights {weights} repeat only after {period} samples; write them with fewer digits")
    target = np.array([int(share * period) for share in shares], dtype=np.int64)  # samples of each a period
    bound = max(2 * len(shares) - 2, 1)  # Tijdeman's 1/(2k - 2), inverted
    count = np.zeros_like(target)
    pattern = np.empty(period, dtype=np.int32)
    for n in range(period):
        owed = bound * (target * (n + 1) - count * period)  # in units of 1/(bound P) of a sample
        due = np.where(owed >= period, ((bound - 1) * period - owed) / target, np.inf)
        pattern[n] = int(due.argmin())
        count[pattern[n]] += 1
    return pattern


def permute(index: int, size: int, seed: int, n: int) -> int:
    """A bijection of 0 … size-1 keyed by (seed, n), without an array: a Feistel network that walks cycles."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    keys = stream(seed, n, ORDER).integers(0, 1 << 63, size=6).tolist()
    while True:
        left, right = index >> half, index & low
        for key in keys:
            mixed = (right * 0x9E3779B97F4A7C15 + key) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed ^ mixed >> 32) & low)
        index = left << half | right
        if index < size:
            return index


class TrainData:
    """The rows of a corpus in the order of a run.

    `repeats`: how often each row comes in succession; row n of the order is then row n // repeats of the corpus's.
    Raises UserError for a corpus without the manifest's sources or with weights for unknown ones.
    """

    def __init__(self, path: str, seed: int, weights: dict[str, float] | None = None, repeats: int = 1):
        manifest = Manifest.load(path)
        chosen = weights or {source.name: source.weight for source in manifest.sources}
        known = {source.name: source for source in manifest.sources}
        if set(chosen) - set(known):
            raise UserError(f"data.weights names {sorted(set(chosen) - set(known))}; {path} has {sorted(known)}")
        self.names = [name for name, weight in chosen.items() if weight > 0]
        if not self.names or min(chosen.values()) < 0:
            raise UserError(f"data.weights is {chosen}, expected 0 or more for each source, and more for at least one")
        self.train = [ShardedRows(Path(path), known[name].train) for name in self.names]
        self.validation = [ShardedRows(Path(path), known[name].validation) for name in self.names]
        for name, rows in zip(self.names, self.train):
            if not len(rows):
                raise UserError(f"{path}: source {name} has no training rows")
        self.seq_len = manifest.seq_len
        self.seed = seed
        self.repeats = repeats
        self.tokenizer = manifest.tokenizer
        self.fingerprint = manifest.fingerprint
        self._pattern = mixture_pattern([chosen[name] for name in self.names])
        self._per_period = np.bincount(self._pattern, minlength=len(self.names))
        self._rank = np.empty_like(self._pattern)  # each position's index among its own source's positions
        for source in range(len(self.names)):
            self._rank[self._pattern == source] = np.arange(self._per_period[source])

    def locate(self, n: int) -> tuple[int, int, int]:
        """(source, epoch, row) of the n-th row of the order; an epoch shows each row of its source once."""
        period, i = divmod(n // self.repeats, len(self._pattern))
        source = int(self._pattern[i])
        j = period * int(self._per_period[source]) + int(self._rank[i])
        epoch, index = divmod(j, len(self.train[source]))
        return source, epoch, permute(index, len(self.train[source]), self.seed, epoch * len(self.names) + source)

    def describe(self, n: int) -> dict:
        """Where the n-th row comes from: {n, source, epoch, row}."""
        source, epoch, row = self.locate(n)
        return {"n": n, "source": self.names[source], "epoch": epoch, "row": row}

    def consumed(self, count: int) -> dict[str, int]:
        """Rows of each source among the first `count` of the order; a row that repeats counts once."""
        periods, rest = divmod(-(-count // self.repeats), len(self._pattern))
        rows = periods * self._per_period + np.bincount(self._pattern[:rest], minlength=len(self.names))
        return dict(zip(self.names, rows.tolist()))

    def held_out(self, rows: int) -> list[tuple[ShardedRows, int, int, int]]:
        """(source, row, i, N) of up to `rows` validation rows a source, evenly spread: its i-th of N."""
        found = []
        for source in self.validation:
            count = min(rows, len(source))
            found += [(source, i * len(source) // count, i, count) for i in range(count)]
        return found
