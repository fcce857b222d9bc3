"""Which row comes when: the n-th row of a run is a pure function of (seed, n), whoever asks for it and when.

    n ──phase──▶ mixture ──▶ source, j ──epochs──▶ row of that source

So the data state is one integer; ranks, accumulation and restarts need no code of their own. There is one phase,
unless a source has `max_epochs`: where it has given all its rows, the next phase begins, of the other sources alone.
"""

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import Any, Self

import numpy as np

from common.errors import UserError
from data_prep.shards import ShardedRows

from .config import RunConfig, total_steps
from .corpora import exact, load_corpora

# What a random stream is for; with (seed, n) it names the stream, so no two uses share one.
NOISE, ORDER, VALIDATION = range(3)
LONGEST_PATTERN = 1_000_000


def stream(seed: int, n: int, purpose: int) -> np.random.Generator:
    """Philox keyed by the pair (seed, n): with a sum, neighbouring seeds would share streams."""
    return np.random.Generator(np.random.Philox(key=[seed, n], counter=[0, 0, 0, purpose]))


def mixture_pattern(weights: Sequence[float | Fraction]) -> np.ndarray:
    """(P,) source index of each position of a period; every prefix has each source within 1 of its share.

    Tijdeman's rule for the chairman assignment problem: of the sources whose share allows one more,
    the one whose next is due first. Weights are read as the decimals they are written as, so the
    period is their common denominator. Raises UserError for weights whose period would be longer
    than a million.
    """
    whole = sum(exact(weight) for weight in weights)
    shares = [exact(weight) / whole for weight in weights]
    period = lcm(*(share.denominator for share in shares))
    if period > LONGEST_PATTERN:
        raise UserError(
            f"mixture weights {', '.join(map(str, weights))} repeat only after {period} samples; "
            "write them with fewer digits, or give each source's by data.weights"
        )
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


class Phase:
    """The part of the order, from position `start` on, in which the same sources take part.

    `drawn` are the rows that each source has given before, `limits` those that it gives in all; None: no limit.
    """

    def __init__(self, start: int, drawn: list[int], weights: list[Fraction], limits: list[int | None]):
        self.start = start
        self.drawn = drawn
        active = [k for k, limit in enumerate(limits) if limit is None or drawn[k] < limit]
        self.pattern = np.array(active, dtype=np.int32)[mixture_pattern([weights[k] for k in active])]
        self.per_period = np.bincount(self.pattern, minlength=len(weights))
        self.rank = np.empty_like(self.pattern)  # each position's index among its own source's positions
        ends = []
        for source in active:
            positions = np.flatnonzero(self.pattern == source)
            self.rank[positions] = np.arange(len(positions))
            limit = limits[source]
            if limit is not None:  # where it gives its last row
                periods, i = divmod(limit - drawn[source] - 1, len(positions))
                ends.append(start + periods * len(self.pattern) + int(positions[i]) + 1)
        self.end = min(ends, default=None)  # None: it goes on for ever

    def locate(self, position: int) -> tuple[int, int]:
        """(source, how many rows that source has given before)."""
        period, i = divmod(position - self.start, len(self.pattern))
        source = int(self.pattern[i])
        return source, self.drawn[source] + period * int(self.per_period[source]) + int(self.rank[i])

    def drawn_before(self, position: int) -> list[int]:
        """Rows that each source has given before a position of this phase, or before its end."""
        periods, rest = divmod(position - self.start, len(self.pattern))
        rows = self.drawn + periods * self.per_period + np.bincount(self.pattern[:rest], minlength=len(self.drawn))
        return rows.tolist()


def phases(weights: list[Fraction], limits: list[int | None]) -> list[Phase]:
    """All phases of the order, the last without an end unless every source has a limit."""
    drawn = [0] * len(weights)
    found = [Phase(0, drawn, weights, limits)]
    while (end := found[-1].end) is not None:
        drawn = found[-1].drawn_before(end)
        if drawn == limits:
            break
        found.append(Phase(end, drawn, weights, limits))
    return found


class TrainData:
    """The rows of one corpus or several in the order of a run.

    `path`, `weights` and `max_epochs` are those of `DataConfig`. `repeats`: how often each row comes in succession;
    row n of the order is then row n // repeats of the corpus's, and counts as one of an epoch's.
    Raises UserError for corpora that do not fit each other, and for weights or limits that do not fit the corpora.
    """

    def __init__(
        self,
        path: Any,
        seed: int,
        weights: dict[str, float] | None = None,
        repeats: int = 1,
        max_epochs: dict[str, float] | None = None,
    ):
        corpora = load_corpora(path)
        chosen = corpora.mixture(weights)
        self.names = list(chosen)
        sources = [corpora.sources[name] for name in self.names]
        self.train = [ShardedRows(Path(source.folder), source.entry.train) for source in sources]
        self.validation = [ShardedRows(Path(source.folder), source.entry.validation) for source in sources]
        for name, source in zip(self.names, sources):
            if not source.rows:
                raise UserError(f"{source.folder}: source {name} has no training rows")
        self.seq_len = corpora.seq_len
        self.seed = seed
        self.repeats = repeats
        self.tokenizer = corpora.tokenizer
        self.fingerprint = corpora.fingerprint
        self._limits = [corpora.row_limit(name, max_epochs) for name in self.names]
        self._phases = phases(list(chosen.values()), self._limits)
        self._starts = [phase.start for phase in self._phases]
        end = self._phases[-1].end
        self.rows = None if end is None else end * repeats  # of the order; None: it has no end

    @classmethod
    def of_run(cls, config: RunConfig, repeats: int) -> Self:
        """What a run draws its rows from. Raises UserError where it has fewer of them than the run's steps take."""
        data = cls(config.data.path, config.train.seed, config.data.weights, repeats, config.data.max_epochs)
        steps, batch = total_steps(config, data.seq_len), config.train.global_batch_size
        if data.rows is not None and data.rows < steps * batch:
            fewer = f"set train.steps to at most {data.rows // batch}, or " if data.rows >= batch else ""
            raise UserError(
                f"the run takes {steps:,} steps × {batch:,} rows = {steps * batch:,}, but {data._rows_in_words()}; "
                f"{fewer}raise data.max_epochs"
            )
        return data

    def locate(self, n: int) -> tuple[int, int, int]:
        """(source, epoch, row) of the n-th row of the order; an epoch shows each row of its source once.

        Raises UserError where the order has no such row, because all its sources have a limit.
        """
        if self.rows is not None and n >= self.rows:
            raise UserError(f"row {n:,} was asked for, but {self._rows_in_words()}; raise data.max_epochs")
        position = n // self.repeats
        source, j = self._phases[bisect_right(self._starts, position) - 1].locate(position)
        epoch, index = divmod(j, len(self.train[source]))
        return source, epoch, permute(index, len(self.train[source]), self.seed, epoch * len(self.names) + source)

    def describe(self, n: int) -> dict:
        """Where the n-th row comes from: {n, source, epoch, row}."""
        source, epoch, row = self.locate(n)
        return {"n": n, "source": self.names[source], "epoch": epoch, "row": row}

    def consumed(self, count: int) -> dict[str, int]:
        """Rows of each source among the first `count` of the order; a row that repeats counts once."""
        position = -(-count // self.repeats)
        phase = self._phases[bisect_right(self._starts, position) - 1]
        return dict(zip(self.names, phase.drawn_before(position)))

    def _rows_in_words(self) -> str:
        """Of an order that ends."""
        about = zip(self.names, self._limits, self.train)
        given = ", ".join(f"{name} {limit:,}, as it has {len(rows):,}" for name, limit, rows in about)
        twice = f", each {self.repeats} times" if self.repeats > 1 else ""
        return f"max_epochs leaves {self.rows:,} ({given}{twice})"

    def held_out(self, rows: int) -> list[tuple[ShardedRows, int, int, int]]:
        """(source, row, i, N) of up to `rows` validation rows a source, evenly spread: its i-th of N."""
        found = []
        for source in self.validation:
            count = min(rows, len(source))
            found += [(source, i * len(source) // count, i, count) for i in range(count)]
        return found
