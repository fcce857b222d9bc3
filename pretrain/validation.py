"""Held-out losses: numbers that differ between steps by the model alone, whatever the number of ranks."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from .data import TrainData
from .step import Batch, Objective, read_rows


@torch.no_grad()
def validate(
    engine: Any, objective: Objective, data: TrainData, rows: int, micro_batch: int, isolated: bool, base: bool
) -> dict[str, float]:
    """All that `objective` measures on up to `rows` held-out rows a source; empty where there are none.

    `base`: at step 0, also what the run is compared with later. All ranks call it together.
    """
    places = data.held_out(rows)
    if not places:
        return {}
    held_out = read_rows([(source, row) for source, row, *_ in places], [i for *_, i, _ in places], isolated)
    held_out.totals = [total for *_, total in places]
    results: dict[str, float] = {}
    engine.eval()
    for measurement in objective.held_out(held_out, base):
        sums = sums_over_ranks(engine, objective, measurement.batch, micro_batch)
        results |= measurement.report(sums)
    engine.train()
    return results


def sums_over_ranks(engine: Any, objective: Objective, batch: Batch, micro_batch: int) -> torch.Tensor:
    """The objective's sums over all rows of a batch that every rank has; the ranks share the work."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = len(batch.tensors["input_ids"])
    total = None
    for begin in range(0, rows, micro_batch * world_size):
        end = min(rows, begin + micro_batch * world_size)
        mine = torch.arange(begin + rank, end, world_size)
        # ZeRO-3 gathers weights in forward, so all ranks call it: a rank without rows repeats one and does not add it
        part = mine if len(mine) else torch.tensor([begin])
        part_of = {name: tensor[part].to(engine.device) for name, tensor in batch.tensors.items()}
        share = replace(batch, tensors=part_of)
        sums = objective.sums(share, objective.losses(engine, share))
        total = torch.zeros_like(sums) if total is None else total
        if len(mine):
            total += sums
    if total is None:
        raise ValueError("a batch without rows has no sums")
    dist.all_reduce(total)
    return total
