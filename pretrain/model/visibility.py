"""Who sees whom in a packed row: annealing state × documents. The one description that all backends obey."""

from dataclasses import dataclass, field
from typing import Literal

import torch

Form = Literal["full", "causal", "bernoulli", "window", "block"]


@dataclass(frozen=True)
class Visibility:
    """Which positions each position attends to.

    `full` is bidirectional, `causal` is the AR model's. Between the two, all of the past and
    `bernoulli`: each future position with probability `ratio`, independently, by a hash of
    (key, i, j), the same for all layers, heads and ranks of a step (the paper's annealing);
    `window`: the next `width` positions; 0 is causal, the row's length full;
    `block`: the rest of the own block of `width` positions; 1 is causal, the row's length full.

    `documents` (B, L) numbers the document of each token; positions of different documents do not see
    each other, and i and j are counted from the document's start, so that a packed document is treated as
    if it were alone. None: one document a row.
    """

    form: Form = "full"
    ratio: float = 1.0
    width: int = 0  # positions
    key: tuple[int, int] = (0, 0)  # (seed, step)
    documents: torch.Tensor | None = None

    def simplified(self, length: int) -> "Visibility":
        """The same visibility as `full` or `causal` where it is one of them for rows of `length`."""
        first = 1 if self.form == "block" else 0  # the width that is causal
        shows_all = self.width >= length - 1 + first if self.form in ("window", "block") else self.ratio >= 1
        shows_none = self.width <= first if self.form in ("window", "block") else self.ratio <= 0
        if self.form in ("full", "causal") or not (shows_all or shows_none):
            return self
        return Visibility("full" if shows_all else "causal", documents=self.documents)

    def sees(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Bool of i's and j's broadcast shape: does position i see position j, by form alone."""
        return sees(self.form, i, j, self.ratio, self.width, self.key)

    def dense(self, length: int, device: torch.device | str) -> torch.Tensor | None:
        """(1 or B, 1, L, L) bool, True where visible; None when every position sees every other."""
        if self.documents is None:
            position = torch.arange(length, device=device)
            return None if self.form == "full" else self.sees(position[:, None], position[None, :])[None, None]
        same = self.documents[:, None, :, None] == self.documents[:, None, None, :]
        if self.form == "full":
            return same
        position = positions(self.documents)
        return same & self.sees(position[:, None, :, None], position[:, None, None, :])


def sees(form: Form, i, j, ratio, width, key) -> torch.Tensor:
    """As `Visibility.sees`; `ratio`, `width` and the two words of `key` may be tensors, for compiled kernels."""
    if form == "full":
        return (i + j) >= 0
    if form == "window":
        return j <= i + width
    if form == "block":
        return j // width <= i // width
    past = j <= i
    return past if form == "causal" else past | (hashed_uniform(key, i, j) < ratio)


def hashed_uniform(key: tuple, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Uniform floats in [0, 1), a pure function of (key, i, j) on any device; i, j int64 below 2^31.

    Rounds of the MurmurHash3 finaliser on 32-bit words, after each of the inputs is mixed in.
    """
    state = (i + j) * 0
    for word in (key[0] & 0xFFFFFFFF, key[0] >> 32 & 0xFFFFFFFF, key[1] & 0xFFFFFFFF, i, j):
        state = ((state ^ word) + 0x9E3779B9) & 0xFFFFFFFF
        state = ((state ^ (state >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        state = ((state ^ (state >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        state = state ^ (state >> 16)
    return (state >> 8).to(torch.float32) * 2.0**-24


def starts(documents: torch.Tensor) -> torch.Tensor:
    """(B, L) bool: the first token of each document, and of each row."""
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return first


def positions(documents: torch.Tensor) -> torch.Tensor:
    """(B, L) int64: each token's position in its document."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return index - torch.where(starts(documents), index, 0).cummax(dim=1).values


@dataclass(frozen=True)
class Segments:
    """Documents of a batch of packed rows, end to end, in the terms of varlen kernels."""

    cu_seqlens: torch.Tensor = field(repr=False)  # (documents + 1,) int32: where each starts in the B·L tokens
    max_seqlen: int  # tokens in the longest

    @classmethod
    def of(cls, visibility: Visibility, batch: int, length: int, device: torch.device) -> "Segments":
        """Rows are documents where `visibility.documents` is None."""
        if visibility.documents is None:
            return cls(torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device), length)
        begin = starts(visibility.documents).flatten().nonzero().flatten()
        cu_seqlens = torch.cat([begin, begin.new_tensor([batch * length])]).to(torch.int32)
        return cls(cu_seqlens, int(cu_seqlens.diff().max()))
