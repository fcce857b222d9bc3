"""The objectives computed anew from their definitions: numpy, torch and transformers' own models, nothing of pretrain.

A test compares what the seam gives with what stands here, so an error would have to be made twice.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

NOISE, VALIDATION = 0, 2  # what a stream of random numbers is for, as pretrain/data.py documents it


@dataclass
class Row:
    """A packed row: its number in the run's order, its tokens and the lengths of its documents; the rest pads."""

    number: int
    ids: np.ndarray  # (L,)
    lengths: list[int]

    @property
    def starts(self) -> list[int]:
        return [sum(self.lengths[:k]) for k in range(len(self.lengths))]


class Source:
    """Rows in memory, read as a source of a corpus is read."""

    def __init__(self, rows: list[Row]):
        self.rows = rows

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rows[index].ids.astype(np.uint16), np.array(self.rows[index].lengths, dtype=np.uint32)

    @property
    def places(self) -> list[tuple["Source", int]]:
        return [(self, index) for index in range(len(self.rows))]

    @property
    def numbers(self) -> list[int]:
        return [row.number for row in self.rows]


def made_up(lengths: list[list[int]], length: int, vocabulary: int = 384, first: int = 0, seed: int = 0) -> Source:
    """Rows of `length` random tokens with documents of these lengths, numbered from `first`."""
    rng = np.random.default_rng(seed)
    return Source([Row(first + k, rng.integers(2, vocabulary, length), parts) for k, parts in enumerate(lengths)])


def random_numbers(seed: int, n: int, purpose: int) -> np.random.Generator:
    """The documented stream of (seed, n): Philox keyed by the pair, its purpose in the counter's last word."""
    return np.random.Generator(np.random.Philox(key=[seed, n], counter=[0, 0, 0, purpose]))


def murmur(key: tuple[int, int], i: int, j: int) -> float:
    """A uniform number of (key, i, j): rounds of MurmurHash3's finaliser in plain integers."""
    state = 0
    for word in (key[0] % 2**32, key[0] // 2**32 % 2**32, key[1] % 2**32, i, j):
        state = ((state ^ word) + 0x9E3779B9) % 2**32
        state = (state ^ state >> 16) * 0x85EBCA6B % 2**32
        state = (state ^ state >> 13) * 0xC2B2AE35 % 2**32
        state ^= state >> 16
    return (state >> 8) / 2**24


def annealed(length: int, ratio: float, key: tuple[int, int]) -> torch.Tensor:
    """(L, L) bool: the whole past, and each future position with probability `ratio`."""
    return torch.tensor([[j <= i or murmur(key, i, j) < ratio for j in range(length)] for i in range(length)])


@dataclass
class Corrupted:
    """A row with its noise."""

    row: Row
    t: float
    maskable: np.ndarray  # (L,) bool
    masked: np.ndarray  # (L,) bool

    def ids(self, mask_token_id: int) -> np.ndarray:
        return np.where(self.masked, mask_token_id, self.row.ids)


def corrupted(
    row: Row, seed: int, *, eps: float = 1e-3, shift: bool = True, isolated: bool = False, pairs: bool = False
) -> Corrupted:
    """The noise of one training row: first its time, then a uniform number for each token."""
    length = len(row.ids)
    maskable = np.arange(length) < sum(row.lengths)
    if shift:  # nothing predicts a first token
        maskable[row.starts if isolated else [0]] = False
    rng = random_numbers(seed, row.number // 2 if pairs else row.number, NOISE)
    t = eps + (1 - 2 * eps if pairs else 1 - eps) * rng.random()
    masked = (rng.random(length) < t) & maskable
    if pairs and row.number % 2:
        t, masked = 1 - t, maskable & ~masked
    return Corrupted(row, t, maskable, masked)


def token_losses(
    model, noised: Corrupted, mask_token_id: int, visible, shift: bool = True, isolated: bool = False
) -> torch.Tensor:
    """(masked,) cross-entropy of the masked tokens, from the full logits of transformers' own model.

    `visible(length)` is the (L, L) mask; with `isolated` documents each is read alone, from position 0.
    """
    row, ids = noised.row, torch.from_numpy(noised.ids(mask_token_id))
    clean, masked = torch.from_numpy(row.ids), torch.from_numpy(noised.masked)
    spans = [(s, s + n) for s, n in zip(row.starts, row.lengths)] if isolated else [(0, len(row.ids))]
    losses = []
    for begin, end in spans:
        hidden = torch.zeros(1, 1, end - begin, end - begin)
        bias = hidden.masked_fill(~visible(end - begin), torch.finfo(torch.float32).min)
        logits = model(ids[None, begin:end], attention_mask=bias).logits[0]
        predicting, predicted = (logits[:-1], slice(begin + 1, end)) if shift else (logits, slice(begin, end))
        nll = F.cross_entropy(predicting, clean[predicted], reduction="none")
        losses.append(nll[masked[predicted]])
    return torch.cat(losses)


def diffusion_loss(
    model,
    noised: list[Corrupted],
    mask_token_id: int,
    visible,
    *,
    shift: bool = True,
    isolated: bool = False,
    normalize_by: str = "masked",
) -> torch.Tensor:
    """Eq. 7 over a global batch: the sum of cross-entropy / t, by the masked or the maskable tokens."""
    total = sum(token_losses(model, c, mask_token_id, visible, shift, isolated).sum() / c.t for c in noised)
    return total / sum(int(getattr(c, normalize_by).sum()) for c in noised)


def stock(folder: Path, mask: bool = False):
    """transformers' own causal LM with eager attention; with `mask` a further token, the mean of the others."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    if mask:
        old = model.get_input_embeddings().weight.shape[0]
        model.resize_token_embeddings(old + 1, mean_resizing=False)
        with torch.no_grad():
            weights = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
            for weight in weights.values():
                weight[old] = weight[:old].mean(0)
    return model


def gradients(loss: torch.Tensor, model) -> dict[str, torch.Tensor]:
    """The gradient of every parameter, by name."""
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


class InOrder:
    """Rows in memory as the order of a run: number n of the order is the row of that number."""

    def __init__(self, source: Source):
        self.train = [source]

    def locate(self, n: int) -> tuple[int, int, int]:
        return 0, 0, self.train[0].numbers.index(n)


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rel: float = 1e-5) -> None:
    """Every parameter's, within `rel` of the gradient's largest entry."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(
            found[name], gradient, rtol=rel, atol=rel * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
