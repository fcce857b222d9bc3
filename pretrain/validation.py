"""Held-out loss on noise that never changes: the NELBO a token, and masked cross-entropy.

In: validation samples with their noise. Out: numbers that differ between steps by the model alone,
whatever the number of ranks.
"""

import torch
import torch.distributed as dist

from .data import Sample, TrainData, collate
from .model.visibility import Visibility


@torch.no_grad()
def validate(engine, data: TrainData, rows: int, times: list[float], micro_batch: int, device) -> dict[str, float]:
    """`val_nelbo` (nats a maskable token), `val_masked_ce` (nats a masked token), and `val_masked_ce_t…` at `times`.

    Bidirectional, whatever the annealing. Empty where the corpus has no validation rows.
    """
    engine.eval()
    results = {}
    for time in (None, *times):
        samples = data.validation_samples(rows, time)
        if not samples:
            break
        weighted, nll, masked = _sums(engine, data, samples, micro_batch, device)
        if time is None:
            results["val_nelbo"] = weighted / sum(int(s.maskable.sum()) for s in samples)
            results["val_masked_ce"] = nll / masked
        else:
            results[f"val_masked_ce_t{time:g}"] = nll / masked
    engine.train()
    return results


def _sums(engine, data: TrainData, samples: list[Sample], micro_batch: int, device) -> tuple[float, float, float]:
    """Over all samples and ranks: the sum of nll/t, of nll, and the number of masked positions."""
    rank, world = dist.get_rank(), dist.get_world_size()
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for first in range(0, len(samples), micro_batch * world):
        group = samples[first : first + micro_batch * world]
        mine = group[rank::world]
        batch = collate(mine or group[:1], data.isolated).to(device)  # all ranks forward alike: ZeRO-3 gathers
        output = engine(
            input_ids=batch.xt,
            labels=batch.labels,
            position_ids=batch.positions,
            visibility=Visibility(documents=batch.documents),
        )
        if mine:
            nll = output.nll.double()
            total += torch.stack([(nll / batch.t).sum(), nll.sum(), torch.tensor(len(nll), device=device)])
    dist.all_reduce(total)
    return tuple(total.tolist())
