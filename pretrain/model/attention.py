"""Who sees whom, and the attention that obeys it: the one seam between visibility and kernels.

In: a `Visibility` (annealing state × documents of a packed row). Out: attention outputs, through the
`AttentionInterface` of transformers, so that no model code is copied or patched. The model's own mask
is switched off by a mask function that returns None; the mask comes from the visibility alone.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

IMPLEMENTATIONS = {"sdpa": "diffullama_sdpa"}  # model.attention: the name registered with transformers


@dataclass(frozen=True)
class Visibility:
    """Which positions each position attends to.

    `form` "full" is bidirectional, "causal" is the AR model's, "bernoulli" is the paper's annealing:
    position i sees all j <= i and each j > i with probability `ratio`, independently, by a hash of
    (key, i, j): the same for all rows, layers, heads and ranks of a step.
    `documents` (B, L) int64 numbers the document of each token; positions of different documents do
    not see each other. None: one document a row. `padding` (B, L) bool is True at real tokens.
    """

    form: Literal["full", "causal", "bernoulli"] = "full"
    ratio: float = 1.0
    key: tuple[int, int] = (0, 0)  # (seed, step)
    documents: torch.Tensor | None = None
    padding: torch.Tensor | None = None

    def sees(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Bool of i's and j's broadcast shape: does query position i see key position j, by form alone."""
        if self.form == "full":
            return torch.ones_like(i + j, dtype=torch.bool)
        past = j <= i
        return past if self.form == "causal" else past | (hashed_uniform(self.key, i, j) < self.ratio)

    def dense(self, length: int, device: torch.device | str) -> torch.Tensor | None:
        """(1 or B, 1, L, L) bool, True where visible; None when every position sees every other."""
        position = torch.arange(length, device=device)
        mask = None if self.form == "full" else self.sees(position[:, None], position[None, :])[None, None]
        if self.documents is not None:
            same = self.documents[:, None, :, None] == self.documents[:, None, None, :]
            mask = same if mask is None else mask & same
        if self.padding is not None:
            # a padded query sees itself, so that its softmax is not empty
            real = self.padding[:, None, None, :] | torch.eye(length, dtype=torch.bool, device=device)
            mask = real if mask is None else mask & real
        return mask


def hashed_uniform(key: tuple[int, int], i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Uniform floats in [0, 1), a pure function of (key, i, j) on any device; i, j int64 below 2^31.

    Rounds of the MurmurHash3 finaliser on 32-bit words, after each of the four inputs is mixed in.
    """
    state = torch.zeros_like(i + j)
    for word in (key[0] & 0xFFFFFFFF, key[0] >> 32 & 0xFFFFFFFF, key[1] & 0xFFFFFFFF, i, j):
        state = ((state ^ word) + 0x9E3779B9) & 0xFFFFFFFF
        state = ((state ^ (state >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        state = ((state ^ (state >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        state = state ^ (state >> 16)
    return (state >> 8).to(torch.float32) * 2.0**-24


@dataclass(frozen=True)
class AttentionPlan:
    """A visibility made ready for a backend, once a forward, for all its layers."""

    mask: torch.Tensor | None  # (1 or B, 1, L, L) bool; None: all visible, or causal
    causal: bool


def plan(visibility: Visibility, length: int, device: torch.device) -> AttentionPlan:
    """What the sdpa backend needs; without documents or padding, full and causal build no L×L mask."""
    if visibility.form == "causal" and visibility.documents is None and visibility.padding is None:
        return AttentionPlan(None, causal=True)
    return AttentionPlan(visibility.dense(length, device), causal=False)


def resolve(requested: str, form: str) -> str:
    """The backend for `model.attention` and `annealing.form`. Raises ValueError naming what can be had."""
    backend = "sdpa" if requested == "auto" else requested
    if backend not in IMPLEMENTATIONS:
        can = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"model.attention is {requested!r}; for annealing {form!r} there are: auto, {can}")
    return backend


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # (B, heads, L, head_dim)
    key: torch.Tensor,  # (B, key_value_heads, L, head_dim)
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    attention_plan: AttentionPlan | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """The signature of transformers' attention functions; returns (B, L, heads, head_dim)."""
    if attention_plan is None:
        raise ValueError("attention was called without a visibility; call the DiffusionModel, not a part of it")
    if sliding_window is not None and query.shape[2] > sliding_window:
        raise ValueError(
            f"rows of {query.shape[2]} tokens, but this model attends within {sliding_window}; use a shorter seq_len"
        )
    if kwargs.get("softcap") is not None:
        raise ValueError("this model caps its attention scores (softcap), which this backend does not do")
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.is_cuda and attention_plan.mask is not None:
        # with a mask, CUDA's fused kernels take no grouped keys, and the unfused one needs B x heads x L x L floats
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        groups = 1
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_plan.mask,
        dropout_p=dropout,
        is_causal=attention_plan.causal,
        scale=scaling,
        enable_gqa=groups > 1,
    )
    return output.transpose(1, 2).contiguous(), None


def _no_mask(*args: object, **kwargs: object) -> None:
    """The model makes no mask of its own; the visibility decides."""


AttentionInterface.register(IMPLEMENTATIONS["sdpa"], _attend)
AttentionMaskInterface.register(IMPLEMENTATIONS["sdpa"], _no_mask)
