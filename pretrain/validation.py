"""Held-out loss on noise that never changes: the NELBO a token, masked cross-entropy, accuracy.

In: validation samples with their noise. Out: numbers that differ between steps by the model alone,
whatever the number of ranks.
"""

from dataclasses import replace

import torch
import torch.distributed as dist

from .data import Sample, TrainData, collate
from .diffusion import BUCKETS, bucket_means, bucket_sums
from .model.visibility import Visibility


@torch.no_grad()
def validate(engine, data: TrainData, rows: int, times: list[float], micro_batch: int, device) -> dict[str, float]:
    """What a bidirectional model loses on held-out rows, whatever the annealing. Empty without such rows.

    `val_nelbo` (nats a maskable token), `val_masked_ce` (nats a masked token), also by buckets of t
    (`val_masked_ce_to_t…`) and at each of `times` (`val_masked_ce_t…`), `val_accuracy` (the share of masked tokens
    that the most likely prediction hits) and `val_mask_share` (of predictions that are the mask token itself).
    """
    samples = data.validation_samples(rows)
    if not samples:
        return {}
    engine.eval()
    sums, by_bucket = _sums(engine, data, samples, micro_batch, device)
    weighted, nll, masked, hits, masks = sums.tolist()
    results = {
        "val_nelbo": weighted / sum(int(s.maskable.sum()) for s in samples),
        "val_masked_ce": nll / masked,
        **bucket_means(by_bucket, "val_masked_ce"),
        "val_accuracy": hits / masked,
        "val_mask_share": masks / masked,
    }
    for time in times:
        sums, _ = _sums(engine, data, data.validation_samples(rows, time), micro_batch, device)
        results[f"val_masked_ce_t{time:g}"] = (sums[1] / sums[2]).item()
    engine.train()
    return results


@torch.no_grad()
def references(engine, data: TrainData, rows: int, micro_batch: int, device) -> dict[str, float]:
    """What the AR base loses on the same rows and noise when it reads causally, as it was trained: step 0 only.

    `causal_masked_ce`, also by buckets of t. Read bidirectionally it loses what `validate` says at step 0.
    """
    samples = data.validation_samples(rows)
    if not samples:
        return {}
    engine.eval()
    sums, by_bucket = _sums(engine, data, samples, micro_batch, device, Visibility("causal"))
    engine.train()
    return {"causal_masked_ce": (sums[1] / sums[2]).item(), **bucket_means(by_bucket, "causal_masked_ce")}


def _sums(
    engine, data: TrainData, samples: list[Sample], micro_batch: int, device, visibility: Visibility | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over all samples and ranks: (nll/t, nll, masked positions, hits, predictions of the mask), and bucket_sums."""
    visibility = visibility or Visibility()
    rank, world = dist.get_rank(), dist.get_world_size()
    total = torch.zeros(5 + 2 * len(BUCKETS), dtype=torch.float64, device=device)
    for first in range(0, len(samples), micro_batch * world):
        group = samples[first : first + micro_batch * world]
        mine = group[rank::world]
        batch = collate(mine or group[:1], data.isolated).to(device)  # all ranks forward alike: ZeRO-3 gathers
        output = engine(
            input_ids=batch.xt,
            labels=batch.labels,
            position_ids=batch.positions,
            visibility=replace(visibility, documents=batch.documents),
        )
        if mine:
            nll, predicted = output.nll.double(), output.predicted
            hits = (predicted == batch.labels[batch.labels >= 0]).sum()
            masks = (predicted == data.mask_token_id).sum()
            masked = torch.tensor(len(nll), device=device)
            total[:5] += torch.stack([(nll / batch.t).sum(), nll.sum(), masked, hits, masks])
            total[5:] += bucket_sums(nll, batch.t).flatten()
    dist.all_reduce(total)
    return total[:5], total[5:].view(2, -1)
