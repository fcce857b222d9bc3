"""runs.py with something changed:  patched.py MODE RUNS.json

record      writes to RUN_DIR/rows.RANK the numbers of the rows of every forward pass that is trained on
poison      the labels of batches 18 to 20 are wrong, and hard to learn
without     a run whose data never had the rows of batches 18 to 20
fill        the checkpoints' disk gets full when the second one begins to be written
"""

import contextlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from runs import make_runs

from pretrain import trainer
from pretrain.model.modeling_diffullama import IGNORE
from pretrain.objectives import OBJECTIVES, MaskedDiffusion
from pretrain.runtime import checkpoint
from pretrain.step import one_forward

FIRST, LAST = 18, 20  # batches
mode, listed = sys.argv[1:]


class Recording(MaskedDiffusion):
    """Gives every row its number, which goes with it to the rank and the forward pass that it is trained in."""

    def __init__(self, config, mask_token_id):
        super().__init__(config, mask_token_id)
        self.output = Path(config.run_dir) / f"rows.{os.environ['RANK']}"

    def batch(self, rows, step, time=None):
        batch = super().batch(rows, step, time)
        if step is not None:
            batch.tensors |= {"number": torch.tensor(rows.numbers), "step": torch.full((len(rows.numbers),), step)}
        return batch

    def losses(self, model, batch):
        if torch.is_grad_enabled():
            (step,) = batch.tensors["step"].unique().tolist()
            with open(self.output, "a") as file:
                file.write(json.dumps({"step": step, "numbers": batch.tensors["number"].tolist()}) + "\n")
        return one_forward(model, batch)


class Poisoned(MaskedDiffusion):
    def batch(self, rows, step, time=None):
        batch = super().batch(rows, step, time)
        if step is not None and FIRST <= rows.numbers[0] // self.global_batch <= LAST:
            labels = batch.tensors["labels"]
            batch.tensors["labels"] = torch.where(labels == IGNORE, labels, (labels * 7 + 3) % 384)
        return batch


def later(n: int) -> int:
    """The number of the n-th row in an order without the rows of FIRST to LAST, of 8 rows a batch."""
    return n if n < 8 * FIRST else n + 8 * (LAST - FIRST + 1)


class Without(MaskedDiffusion):
    def batch(self, rows, step, time=None):
        return super().batch(rows if step is None else replace(rows, numbers=[*map(later, rows.numbers)]), step, time)


class WithoutRows(trainer.TrainData):
    def locate(self, n):
        return super().locate(later(n))


def room_and_then_none(root, at_least):
    """In place of `missing_bytes`: there is room, which something else takes before the checkpoint is written."""
    if list(root.glob("step_*")):
        with open(root / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
    return 0


if mode == "record":
    OBJECTIVES["masked_diffusion"] = Recording
elif mode == "poison":
    OBJECTIVES["masked_diffusion"] = Poisoned
elif mode == "without":
    OBJECTIVES["masked_diffusion"] = Without
    trainer.TrainData = WithoutRows
elif mode == "fill":
    checkpoint.missing_bytes = room_and_then_none
else:
    sys.exit(f"no mode {mode}")
sys.exit(make_runs(listed))
