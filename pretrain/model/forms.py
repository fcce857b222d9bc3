"""Forms of visibility: which positions a position attends to, by their distance or block alone.

Two are fixed: `Full` (bidirectional) and `Causal` (the autoregressive model's). The others stand between the
two while attention is annealed: each shows the whole past and a part of the future that grows with progress.
A form is one frozen dataclass that knows

    mask_mod(i, j, *numbers)  bool: does position i see position j? FlexAttention's term. `numbers` are the
                              form's fields, given apart so that compiled kernels may get them as tensors
    visible_share(length)     share of the length² pairs of a row that attention computes
    flash_window              `window_size` of flash kernels (left, right; -1: all), None where they cannot show it
    simplified(length)        the same as `Full` or `Causal` where it is one of them for rows of this length
    metrics()                 what a training step reports about it

and, if it can be annealed, `at(progress, length, key)`: the form at a progress from 0 (causal) to 1 (full).
A new form is one class here, its place in `Form` and ANNEALED, and its tests.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class Full:
    """Bidirectional: every position."""

    name: ClassVar[str] = "full"
    flash_window: ClassVar[tuple[int, int]] = (-1, -1)

    @staticmethod
    def mask_mod(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (i + j) >= 0  # always true, of i's and j's common shape

    def visible_share(self, length: int) -> float:
        return 1.0

    def simplified(self, length: int) -> "Form":
        return self

    def metrics(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Causal:
    """The position itself and its past."""

    name: ClassVar[str] = "causal"
    flash_window: ClassVar[tuple[int, int]] = (-1, 0)

    @staticmethod
    def mask_mod(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return j <= i

    def visible_share(self, length: int) -> float:
        return (length + 1) / (2 * length)

    def simplified(self, length: int) -> "Form":
        return self

    def metrics(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Bernoulli:
    """The past, and each future position with probability `ratio`: the annealing of arXiv 2410.17891, section 3.2.

    Whether i sees j is a hash of (key, i, j), the same for all layers, heads and ranks of a step. `key` is
    (seed, step).
    """

    ratio: float
    key: tuple[int, int] = (0, 0)
    name: ClassVar[str] = "bernoulli"
    flash_window: ClassVar[None] = None  # no flash kernel takes a random mask

    @classmethod
    def at(cls, progress: float, length: int, key: tuple[int, int]) -> "Form":
        return cls(progress, key)

    @staticmethod
    def mask_mod(i: torch.Tensor, j: torch.Tensor, ratio, key) -> torch.Tensor:
        return (j <= i) | (hashed_uniform(key, i, j) < ratio)

    def visible_share(self, length: int) -> float:
        """Its expectation."""
        return (length + 1 + self.ratio * (length - 1)) / (2 * length)

    def simplified(self, length: int) -> "Form":
        return Full() if self.ratio >= 1 else Causal() if self.ratio <= 0 else self

    def metrics(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Window:
    """The past and the next `width` positions: 0 is causal, the row's length full. Flash kernels can show it."""

    width: int
    name: ClassVar[str] = "window"

    @classmethod
    def at(cls, progress: float, length: int, key: tuple[int, int]) -> "Form":
        """The width grows in proportion, from 0 to length - 1."""
        return cls(round(progress * (length - 1)))

    @property
    def flash_window(self) -> tuple[int, int]:
        return (-1, self.width)

    @staticmethod
    def mask_mod(i: torch.Tensor, j: torch.Tensor, width) -> torch.Tensor:
        return j <= i + width

    def visible_share(self, length: int) -> float:
        near = min(self.width, length - 1)
        return (length * (length + 1) / 2 + near * length - near * (near + 1) / 2) / length**2

    def simplified(self, length: int) -> "Form":
        return Full() if self.width >= length - 1 else Causal() if self.width <= 0 else self

    def metrics(self) -> dict[str, float]:
        return {"right_context": self.width}


@dataclass(frozen=True)
class Block:
    """The past and the rest of its own block of `width` positions: 1 is causal, the row's length full."""

    width: int
    name: ClassVar[str] = "block"
    flash_window: ClassVar[None] = None

    @classmethod
    def at(cls, progress: float, length: int, key: tuple[int, int]) -> "Form":
        """The width doubles from 1 to length, as in block diffusion; each doubling takes the same number of steps."""
        return cls(length if progress >= 1 else min(length, 2 ** round(progress * math.log2(length))))

    @staticmethod
    def mask_mod(i: torch.Tensor, j: torch.Tensor, width) -> torch.Tensor:
        return j // width <= i // width

    def visible_share(self, length: int) -> float:
        whole, rest = divmod(length, self.width)
        future = whole * self.width * (self.width - 1) / 2 + rest * (rest - 1) / 2
        return (length * (length + 1) / 2 + future) / length**2

    def simplified(self, length: int) -> "Form":
        return Full() if self.width >= length else Causal() if self.width <= 1 else self

    def metrics(self) -> dict[str, float]:
        return {"block_size": self.width}


Form = Full | Causal | Bernoulli | Window | Block
ANNEALED = {form.name: form for form in (Bernoulli, Window, Block)}


def numbers_of(form: Form) -> tuple[Any, ...]:
    """The form's fields in order: what `mask_mod` takes after i and j."""
    return tuple(getattr(form, f.name) for f in fields(form))


def hashed_uniform(key, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
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
