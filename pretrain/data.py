"""Shards to batches: sample n of the run is a pure function of (seed, n), whoever asks for it and when.

    n ──mixture──▶ source, j ──epochs──▶ row ──shards──▶ x0 ──noise(seed, n)──▶ xt, labels, t

So the data state is one integer; ranks, accumulation and restarts need no code of their own.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm

import numpy as np
import torch

from common.errors import UserError
from data_prep.shards import Manifest, Path, Rows

from .diffusion import EPS, corrupt, maskable_positions, sample_time
from .model.modeling_diffullama import IGNORE

# What a random stream is for; with (seed, n) it names the stream, so no two uses share one.
NOISE, ORDER, VALIDATION = range(3)
LONGEST_PATTERN = 1_000_000
STRATA = 1 << 60  # the permutations of strata begin here, far from those of epochs


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


@dataclass
class Sample:
    """One row and its noise, as numpy arrays of length L."""

    x0: np.ndarray  # int64
    xt: np.ndarray
    masked: np.ndarray  # bool
    maskable: np.ndarray  # bool
    t: float
    document_lengths: np.ndarray


@dataclass
class Batch:
    """What a forward pass needs; (B, L) unless said otherwise."""

    xt: torch.Tensor
    labels: torch.Tensor  # x0 at masked positions, else -100
    t: torch.Tensor  # (masked,) float32: the time of each masked position, row-major
    documents: torch.Tensor | None  # the document number of each token, where isolated
    positions: torch.Tensor | None  # restarting a document, where isolated

    def to(self, device: torch.device) -> "Batch":
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in vars(self).items() if v is not None})


class TrainData:
    """Samples of a corpus in their global order.

    `times` is diffusion.times of the run configuration; what is not independent looks at the global batch.
    Raises UserError for a corpus without the manifest's sources or with weights for unknown ones.
    """

    def __init__(
        self,
        path: str,
        mask_token_id: int,
        seed: int,
        weights: dict[str, float] | None = None,
        isolated: bool = False,
        eps: float = EPS,
        times: str = "independent",
        global_batch: int = 1,
    ):
        manifest = Manifest.load(path)
        chosen = weights or {source.name: source.weight for source in manifest.sources}
        known = {source.name: source for source in manifest.sources}
        if set(chosen) - set(known):
            raise UserError(f"data.weights names {sorted(set(chosen) - set(known))}; {path} has {sorted(known)}")
        self.names = [name for name, weight in chosen.items() if weight > 0]
        self.train = [Rows(Path(path), known[name].train) for name in self.names]
        self.validation = [Rows(Path(path), known[name].validation) for name in self.names]
        for name, rows in zip(self.names, self.train):
            if not len(rows):
                raise UserError(f"{path}: source {name} has no training rows")
        self.seq_len, self.seed, self.tokenizer = manifest.seq_len, seed, manifest.tokenizer
        self.mask_token_id, self.isolated, self.eps = mask_token_id, isolated, eps
        self.times, self.global_batch = times, global_batch
        self.fingerprint = manifest.fingerprint
        self._pattern = mixture_pattern([chosen[name] for name in self.names])
        self._per_period = np.bincount(self._pattern, minlength=len(self.names))
        self._rank = np.empty_like(self._pattern)  # how many of the same source stand before, in the period
        for source in range(len(self.names)):
            self._rank[self._pattern == source] = np.arange(self._per_period[source])

    def place(self, n: int) -> tuple[int, int, int]:
        """(source, epoch, row) of the n-th sample; an epoch shows each row of its source once."""
        period, i = divmod(n, len(self._pattern))
        source = int(self._pattern[i])
        j = period * int(self._per_period[source]) + int(self._rank[i])
        epoch, index = divmod(j, len(self.train[source]))
        return source, epoch, permute(index, len(self.train[source]), self.seed, epoch * len(self.names) + source)

    def sample(self, n: int) -> Sample:
        """The n-th sample of the run, with its noise."""
        pairs = self.times == "complementary"
        source, _, row = self.place(n // 2 if pairs else n)
        noise = stream(self.seed, n // 2 if pairs else n, NOISE)
        u = noise.random()
        if self.times == "stratified":
            step, i = divmod(n, self.global_batch)
            u = (permute(i, self.global_batch, self.seed, STRATA + step) + u) / self.global_batch
        if not pairs:
            return self._corrupted(self.train[source].row(row), sample_time(u, self.eps), noise)
        t = self.eps + (1 - 2 * self.eps) * u  # so that 1 - t is a time too
        return self._corrupted(self.train[source].row(row), t, noise, complement=n % 2 == 1)

    def describe(self, n: int) -> dict:
        """Where the n-th sample comes from: {n, source, epoch, row}."""
        source, epoch, row = self.place(n // 2 if self.times == "complementary" else n)
        return {"n": n, "source": self.names[source], "epoch": epoch, "row": row}

    def consumed(self, count: int) -> dict[str, int]:
        """Rows of each source among the first `count` samples; a pair of complementary masks is one row."""
        count = -(-count // 2) if self.times == "complementary" else count
        periods, rest = divmod(count, len(self._pattern))
        rows = periods * self._per_period + np.bincount(self._pattern[:rest], minlength=len(self.names))
        return dict(zip(self.names, rows.tolist()))

    def validation_samples(self, rows: int, time: float | None = None) -> list[Sample]:
        """Up to `rows` validation rows a source on noise that depends on nothing but the row's number.

        `time` fixes t; otherwise row i of N gets a time in the i-th of N equal parts of (0, 1], so that
        few rows cover all times.
        """
        samples = []
        for source in self.validation:
            count = min(rows, len(source))
            for i in range(count):
                noise = stream(0, i, VALIDATION)
                t = sample_time((i + noise.random()) / count, self.eps) if time is None else time
                samples.append(self._corrupted(source.row(i * len(source) // count), t, noise))
        return samples

    def _corrupted(self, row, t: float, noise: np.random.Generator, complement: bool = False) -> Sample:
        """`complement`: what the same noise leaves unmasked at t is masked, at time 1 - t."""
        x0, lengths = row[0].astype(np.int64), row[1].astype(np.int64)
        padding = self.seq_len - int(lengths.sum())  # at the end of a row that best_fit could not fill
        if padding:
            lengths = np.append(lengths, padding)
        maskable = maskable_positions(lengths, self.isolated)
        maskable[self.seq_len - padding :] = False
        xt, masked = corrupt(x0, maskable, np.float64(t), noise.random(self.seq_len), self.mask_token_id)
        if complement:
            masked = maskable & ~masked
            xt, t = np.where(masked, self.mask_token_id, x0), 1 - t
        return Sample(x0, xt, masked, maskable, float(t), lengths)


def collate(samples: list[Sample], isolated: bool) -> Batch:
    """(B, L) tensors of B samples."""
    xt = torch.from_numpy(np.stack([s.xt for s in samples]))
    labels = torch.from_numpy(np.stack([np.where(s.masked, s.x0, IGNORE) for s in samples]))
    t = torch.from_numpy(np.concatenate([np.full(s.masked.sum(), s.t, dtype=np.float32) for s in samples]))
    if not isolated:
        return Batch(xt, labels, t, None, None)
    documents = [np.repeat(np.arange(len(s.document_lengths)), s.document_lengths) for s in samples]
    positions = [np.concatenate([np.arange(length) for length in s.document_lengths]) for s in samples]
    return Batch(xt, labels, t, torch.from_numpy(np.stack(documents)), torch.from_numpy(np.stack(positions)))


@dataclass
class StepData:
    """One rank's part of one optimizer step."""

    batches: list[Batch]  # one a micro-batch
    masked: int  # masked positions of the global batch
    maskable: int  # maskable positions of the global batch


def step_data(data: TrainData, step: int, global_batch: int, micro_batch: int, rank: int, world_size: int) -> StepData:
    """The samples of `rank` in optimizer step `step`, and the counts over all ranks.

    Every rank draws the noise of all samples, so all know the counts without communication.
    """
    first = step * global_batch
    samples = [data.sample(n) for n in range(first, first + global_batch)]
    mine = samples[rank::world_size]
    batches = [collate(mine[i : i + micro_batch], data.isolated) for i in range(0, len(mine), micro_batch)]
    return StepData(batches, sum(int(s.masked.sum()) for s in samples), sum(int(s.maskable.sum()) for s in samples))
