"""One optimizer step: from row numbers to updated weights. The seam between the trainer and its objectives.

    numbers ──read_rows──▶ Rows ──objective.batch──▶ Batch ──objective.losses──▶ Losses ──▶ backward, update
                                                                     └─objective.sums──▶ objective.metrics

Nothing here knows what an objective masks, weights or reports.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.distributed as dist

from data_prep.shards import ShardedRows

from .config import RunConfig
from .data import TrainData
from .model.forms import Form
from .model.modeling_diffullama import IGNORE
from .model.visibility import Visibility


@dataclass
class Rows:
    """Packed rows of a corpus as numpy arrays; R rows of L tokens."""

    numbers: list[int]  # (R,) each row's number in its order: with the seed, it decides the row's noise
    x0: np.ndarray  # (R, L) int64
    real: np.ndarray  # (R, L) bool: False at the padding that ends a row
    first: np.ndarray  # (R, L) bool: a row's first token, and each document's first where documents are isolated
    documents: np.ndarray | None = None  # (R, L) the document number of each token, where isolated
    positions: np.ndarray | None = None  # (R, L) restarting with each document, where isolated
    totals: list[int] = field(default_factory=list)  # (R,) held-out rows: how many of the source are read


@dataclass
class Batch:
    """What a forward pass needs, and what the objective reports by. Every tensor's first dimension is the row."""

    tensors: dict[str, torch.Tensor]  # input_ids, labels, loss_weights (R, L); documents, position_ids where isolated
    form: Form  # who sees whom
    counts: dict[str, int]  # of the global batch; "labelled": positions that bear a loss
    notes: dict[str, float] = field(default_factory=dict)  # metrics that are known before the forward pass


@dataclass
class Losses:
    loss: torch.Tensor  # scalar with a gradient: the sum of loss_weights · nll
    nll: torch.Tensor  # (labelled,) nats, in row-major order
    predicted: torch.Tensor | None  # (labelled,) most likely tokens; only without gradients


@dataclass(frozen=True)
class Reported:
    """The names under which an objective reports, for all that reads metrics.jsonl."""

    training: str  # nats a labelled token, each counted alike
    compared: tuple[str, ...]  # training losses that may be compared between steps: spikes and trends are seen here
    held_out: str  # nats a token: the loss that decides the verdict on a run
    base: str | None = None  # held out, of the AR base read causally; written at step 0 alone


@dataclass
class HeldOut:
    """One measurement on held-out rows."""

    batch: Batch
    report: Callable[[torch.Tensor], dict[str, float]]  # turns the objective's sums, over all rows, into metrics


class Objective(Protocol):
    """What is trained: one file in pretrain/objectives each."""

    reported: ClassVar[Reported]
    masks: ClassVar[bool]  # whether the tokenizer needs a mask token
    repeats: int  # how often each row comes in succession

    @staticmethod
    def forms(config: RunConfig) -> list[Form]:
        """One example of each form of visibility that a run will ask attention for."""
        ...

    def batch(self, rows: Rows, step: int) -> Batch:
        """The global batch of an optimizer step; loss_weights are normalised over it."""
        ...

    def losses(self, model: Any, batch: Batch) -> Losses:
        """Usually `one_forward`."""
        ...

    def sums(self, batch: Batch, losses: Losses) -> torch.Tensor:
        """(K,) float64: what adds up over passes and ranks."""
        ...

    def metrics(self, counts: dict[str, int], sums: torch.Tensor) -> dict[str, float]:
        """What a step reports, of the sums over the global batch; `loss` is one of them."""
        ...

    def held_out(self, rows: Rows, base: bool) -> Iterator[HeldOut]:
        """What is measured on held-out rows; with `base` also what a run is compared with, at step 0."""
        ...

    def shipped(self, tokenizer: dict) -> dict[str, Any]:
        """Entries of the model's config.json; `tokenizer` is the manifest's."""
        ...


def read_rows(places: list[tuple[ShardedRows, int]], numbers: list[int], isolated: bool) -> Rows:
    """Read a row for each of `places`, (source, row)."""
    read = [source.row(row) for source, row in places]
    x0 = np.stack([ids for ids, _ in read]).astype(np.int64)
    index = np.arange(x0.shape[1])
    used = np.array([lengths.sum() for _, lengths in read], dtype=np.int64)
    rows = Rows(numbers, x0, real=index < used[:, None], first=np.broadcast_to(index == 0, x0.shape))
    if isolated:
        # padding is one more document, which nothing else sees
        lengths = [np.append(part, len(index) - part.sum()).astype(np.int64) for _, part in read]
        rows.documents = np.stack([np.repeat(np.arange(len(part)), part) for part in lengths])
        rows.positions = np.stack([np.concatenate([np.arange(n) for n in part]) for part in lengths])
        rows.first = rows.positions == 0
    return rows


def read_step(
    data: TrainData,
    objective: Objective,
    step: int,
    numbers: range,
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int | None = None,
    isolated: bool = False,
) -> list[Batch]:
    """The micro-batches of `rank` in optimizer step `step`, whose global batch has the rows `numbers`.

    Every rank reads all rows and draws their noise, so all know the normalisation without communication.
    """
    located = [data.locate(n) for n in numbers]
    rows = read_rows([(data.train[source], row) for source, _, row in located], list(numbers), isolated)
    whole = objective.batch(rows, step)
    mine = torch.arange(rank, len(numbers), world_size)
    return [
        replace(whole, tensors={name: tensor[part] for name, tensor in whole.tensors.items()})
        for part in mine.split(micro_batch or len(mine))
    ]


def one_forward(model: Any, batch: Batch) -> Losses:
    """The losses of one forward pass over a batch on the model's device."""
    tensors = batch.tensors
    output = model(
        input_ids=tensors["input_ids"],
        labels=tensors["labels"],
        loss_weights=tensors["loss_weights"],
        position_ids=tensors.get("position_ids"),
        visibility=Visibility(batch.form, tensors.get("documents")),
    )
    return Losses(output.loss, output.nll, output.predicted)


def mean(total: float, count: float) -> float:
    """total / count; not a number where there is nothing to count."""
    return total / count if count else math.nan


def at_labels(by_row: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(labelled,) the value of each labelled position's row, from (R,)."""
    return by_row[:, None].expand_as(labels)[labels != IGNORE]


def train_step(
    engine: Any,
    objective: Objective,
    batches: list[Batch],
    lr: float,
    stop: Callable[[], int] = lambda: 0,
    phase: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """One optimizer step on this rank's micro-batches; returns metrics of the global batch.

    `stop()` is this rank's request at the end of the step: 0 continue, 1 time limit, 2 signal. `stop` in the metrics
    is the largest of all ranks, so they leave the loop together. `update_skipped` is True, on all ranks, when a loss
    or gradient anywhere was not finite: then parameters and optimizer are as before. `phase` is told where the step
    stands.
    """
    scale = dist.get_world_size() * len(batches)  # DeepSpeed averages over ranks and passes; our weights already do
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    skipped = False
    sums = torch.zeros((), dtype=torch.float64, device=engine.device)
    for number, batch in enumerate(batches, 1):
        phase(f"forward {number} of {len(batches)}")
        on_device = {name: tensor.to(engine.device, non_blocking=True) for name, tensor in batch.tensors.items()}
        on_device["loss_weights"] = on_device["loss_weights"] * scale
        batch = replace(batch, tensors=on_device)
        losses = objective.losses(engine, batch)
        phase(f"backward {number} of {len(batches)}")
        value = losses.loss.detach()
        # turns a non-finite loss into NaN gradients, so that every ZeRO stage sees it
        engine.backward(losses.loss * (1 + (value - value)))
        plain_norm = unpartitioned_norm(engine)
        phase(f"update after {number} of {len(batches)}")
        if math.isfinite(plain_norm):  # at the other stages DeepSpeed itself makes no update otherwise
            engine.step()
        else:
            skipped = True
            engine.optimizer.step = lambda: None
            engine.step()
            del engine.optimizer.step
        sums = sums + objective.sums(batch, losses)
    phase("metrics")
    requests = torch.zeros(3, dtype=torch.float64, device=engine.device)
    requests[stop()] = 1
    together = torch.cat([sums, requests])
    dist.all_reduce(together)
    sums, requests = together[:-3], together[-3:]
    return {
        **objective.metrics(batches[0].counts, sums),
        **batches[0].notes,
        "lr": lr,
        "grad_norm": float(engine.get_global_grad_norm() or plain_norm),
        "update_skipped": skipped or not engine.was_step_applied(),
        "stop": int(requests.nonzero().max()),
    }


def unpartitioned_norm(engine: Any) -> float:
    """Norm of the averaged gradients before clipping, which DeepSpeed does not report at stage 0 in fp32."""
    if engine.zero_optimization_stage() > 0 or not engine.is_gradient_accumulation_boundary():
        return 0.0
    return float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))
