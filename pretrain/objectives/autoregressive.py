"""Next-token prediction: the objective of the base models, for pretraining one or going on with one."""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch

from ..config import RunConfig
from ..model.forms import Causal, Form
from ..model.modeling_diffullama import IGNORE
from ..step import Batch, HeldOut, Losses, Reported, Rows, mean, one_forward


class Autoregressive:
    """Cross-entropy of every token given those before it in its row, or in its document where these are isolated."""

    reported: ClassVar[Reported] = Reported(training="loss", compared=("loss",), held_out="val_loss")
    masks: ClassVar[bool] = False
    repeats = 1
    losses = staticmethod(one_forward)

    def __init__(self, config: RunConfig, mask_token_id: int | None = None):
        pass  # it has no settings

    @staticmethod
    def forms(config: RunConfig) -> list[Form]:
        """Causal, from the first step to the last."""
        return [Causal()]

    def batch(self, rows: Rows, step: int) -> Batch:
        """Clean rows; every token but a first one is a label, and each weighs 1 / (labels of the global batch)."""
        labels = np.where(rows.real & ~rows.first, rows.x0, IGNORE)
        labelled = int((labels != IGNORE).sum())
        tensors = {
            "input_ids": torch.from_numpy(rows.x0),
            "labels": torch.from_numpy(labels),
            "loss_weights": torch.tensor(1 / max(labelled, 1)).expand(rows.x0.shape),
        }
        if rows.documents is not None:
            tensors |= {
                "documents": torch.from_numpy(rows.documents),
                "position_ids": torch.from_numpy(rows.positions),
            }
        return Batch(tensors, Causal(), {"labelled": labelled})

    def sums(self, batch: Batch, losses: Losses) -> torch.Tensor:
        """nll; in evaluation also hits."""
        nll = losses.nll.double()
        hits = nll.new_zeros(())
        if losses.predicted is not None:
            labels = batch.tensors["labels"]
            hits = (losses.predicted == labels[labels != IGNORE]).sum().double()
        return torch.stack([nll.sum(), hits])

    def metrics(self, counts: dict[str, int], sums: torch.Tensor) -> dict[str, float]:
        """`loss` in nats a token."""
        return {"loss": sums[0].item() / max(counts["labelled"], 1)}

    def held_out(self, rows: Rows, base: bool) -> Iterator[HeldOut]:
        """`val_loss` in nats a token, and `val_accuracy`, the share of tokens that the most likely prediction hits."""
        batch = self.batch(rows, 0)
        count = batch.counts["labelled"]

        def report(sums: torch.Tensor) -> dict[str, float]:
            nll, hits = sums.tolist()
            return {"val_loss": mean(nll, count), "val_accuracy": mean(hits, count)}

        yield HeldOut(batch, report)

    def shipped(self, tokenizer: dict) -> dict[str, Any]:
        """Nothing: what ships is a causal language model of transformers."""
        return {}
