"""Compares the logits of a written folder with those of the trained weights, on a fixed batch. Not a verb.

A model is run with one layer's weights in memory at a time, so that the check needs no more memory than the export.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import cpu_offload, init_empty_weights
from transformers import PretrainedConfig

from pretrain.model.attention import IMPLEMENTATION
from pretrain.model.modeling_diffullama import DiffusionModel

from .weights import Weight

BATCH = (2, 32)  # rows, tokens


@dataclass(frozen=True)
class Parity:
    """Exported against trained, on the logits of every position of the batch."""

    largest: float  # difference of a logit
    agreement: float  # share of positions with the same most likely token
    exact: bool  # equal to the bit

    def __str__(self) -> str:
        if self.exact:
            return "parity: the exported logits are the trained ones, bit for bit"
        return (
            f"parity: exported and trained logits differ by at most {self.largest:.2g}, "
            f"and have the same most likely token at {self.agreement:.1%} of the positions"
        )


def compare(exported: torch.Tensor, trained: torch.Tensor) -> Parity:
    """Compare logits (B, L, V)."""
    same = exported.argmax(-1) == trained.argmax(-1)
    difference = (exported.float() - trained.float()).abs().max()
    return Parity(difference.item(), same.float().mean().item(), torch.equal(exported, trained))


def fixed_batch(config: PretrainedConfig, vocabulary: int) -> torch.Tensor:
    """(2, 32) ids below `vocabulary`, or as many as the model takes; half of the tokens are masks, if it has one."""
    length = min(BATCH[1], getattr(config, "max_position_embeddings", None) or BATCH[1])
    ids = torch.randint(0, vocabulary, (BATCH[0], length), generator=torch.Generator().manual_seed(0))
    mask = getattr(config, "mask_token_id", None)
    if mask is not None and mask < vocabulary:
        ids[:, length // 2 :] = mask
    return ids


@torch.no_grad()
def logits_of(
    model_class: Any, config: PretrainedConfig, weights: Mapping[str, Weight], ids: torch.Tensor
) -> torch.Tensor:
    """Logits (B, L, V) of `ids` (B, L) in config.dtype, computed on the CPU with each weight read when it is needed."""
    attention = {"attn_implementation": IMPLEMENTATION} if issubclass(model_class, DiffusionModel) else {}
    with init_empty_weights(include_buffers=False):  # no file holds the buffers
        model = model_class._from_config(copy.deepcopy(config), **attention).to(config.dtype).eval()
    tensors: Any = _Tensors(weights, model.all_tied_weights_keys)  # any mapping will do
    cpu_offload(model, torch.device("cpu"), state_dict=tensors)
    return model(input_ids=ids).logits


class _Tensors(Mapping[str, torch.Tensor]):
    """Weights as tensors, a tied one under each of its names."""

    def __init__(self, weights: Mapping[str, Weight], tied: dict[str, str]):
        self.weights = weights
        self.stored_as = {name: name for name in weights}
        for name, source in tied.items():
            stored = source if source in weights else name
            self.stored_as |= {name: stored, source: stored}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[self.stored_as[name]].contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored_as)

    def __len__(self) -> int:
        return len(self.stored_as)
