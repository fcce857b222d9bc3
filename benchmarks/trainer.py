"""What the trainer costs beside the bare DeepSpeed engine: same process, engine and batches, in alternating blocks.

    torchrun --nproc_per_node 2 benchmarks/trainer.py --config CONFIG [--deepspeed_config JSON] key=value ...

The run of CONFIG is trained by `Trainer.run`. After every --block steps of it, the engine alone runs the same batches
again, already read: forward, backward, update. A step of the trainer is everything from the end of the one before to
its own end: waiting for data, gradient norm, metrics over all ranks, guards, the line in metrics.jsonl. Validation and
checkpoints are left out, since their cost is a choice. Writes benchmarks/trainer.md.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: find the project
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from common.cli import command, make_parser
from common.config import load_config
from common.errors import UserError
from pretrain import adapt, deepspeed_config
from pretrain.config import RunConfig, check_run
from pretrain.launch import check_corpus, fast_dtype, launch_environment, packaged, start_ranks
from pretrain.objectives import OBJECTIVES
from pretrain.step import Batch, one_forward, read_step
from pretrain.trainer import Trainer

GOAL = 1.03  # times the bare engine
FORCED = ["checkpoint.keep=0", "validation.rows=0", "wandb.mode=disabled", "run_dir=runs/benchmark_trainer"]


@dataclass
class Times:
    """Seconds of one rank; a list a block, without the first block of each kind."""

    trainer: list[list[float]] = field(default_factory=list)
    bare: list[list[float]] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)  # of one step's batches

    def ratios(self) -> list[float]:
        """Of each block of the trainer to the bare one that follows it."""
        return [sum(ours) / sum(bare) for ours, bare in zip(self.trainer, self.bare)]


class Measured(Trainer):
    """The trainer, with a block of bare steps after each `block` of its own."""

    block = 4  # steps

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.times = Times()
        self._mine: list[float] = []
        self._blocks = 0
        self._began = time.perf_counter()

    def _save_if_due(self, last: bool) -> None:
        """The last thing in a step of the loop: here the block may end, and the engine take its turn."""
        self._mine.append(time.perf_counter() - self._began)
        if len(self._mine) == self.block:
            steps = range(self.done - self.block, self.done)
            read = [self._batches(step) for step in steps]
            bare = [bare_step(self.engine, batches) for batches in read]
            self._blocks += 1
            if self._blocks > 1:
                self.times.trainer.append(self._mine)
                self.times.bare.append(bare)
            self._mine = []
        self._began = time.perf_counter()

    def _batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step that is over, on the device."""
        train = self.config.train
        began = time.perf_counter()
        first = self.guard.batch(step) * train.global_batch_size
        batches = read_step(
            self.data, self.objective, step, range(first, first + train.global_batch_size), self.rank,
            self.world_size, train.micro_batch_size, self.config.data.isolate_documents,
        )  # fmt: skip
        self.times.reading.append(time.perf_counter() - began)
        for batch in batches:
            batch.tensors = {name: tensor.to(self.engine.device) for name, tensor in batch.tensors.items()}
        return batches


def bare_step(engine: Any, batches: list[Batch]) -> float:
    """Seconds that DeepSpeed needs for one optimizer step, without any of the trainer's work."""
    began = time.perf_counter()
    for batch in batches:
        engine.backward(one_forward(engine, batch).loss)
        engine.step()
    if engine.device.type == "cuda":  # the trainer waits for the device, since it reads the loss
        torch.cuda.synchronize()
    return time.perf_counter() - began


def make_trainer(args: argparse.Namespace) -> Measured:
    """The trainer of a configuration, made as pretrain/main.py makes it."""
    config = load_config(RunConfig, packaged(args.config), [*FORCED, *args.overrides])
    check_run(config)
    world_size = launch_environment()
    tokenizer = adapt.load_tokenizer(config.model)
    manifest = check_corpus(config, tokenizer)
    base = adapt.base_config(config.model, manifest.seq_len)
    mask_token_id = adapt.add_mask_token(tokenizer, config.model) if OBJECTIVES[config.objective].masks else None
    adapt.check_fits(config, base, manifest.tokenizer["vocab_size"])
    dtype = fast_dtype() if config.model.dtype == "auto" else config.model.dtype
    path = packaged(args.deepspeed_config)
    ds_config = deepspeed_config.resolve(path, config, dtype, base.hidden_size, world_size)
    start_ranks(config, world_size)
    return Measured(config, base, tokenizer, mask_token_id, ds_config)


def report(trainer: Measured) -> str:
    """What was measured, on what, in Markdown."""
    times = trainer.times
    ours, bare = ([s for block in blocks for s in block] for blocks in (times.trainer, times.bare))
    low, middle, high = statistics.quantiles(times.ratios(), n=4)
    ratio = statistics.median(ours) / statistics.median(bare)
    model, train = trainer.engine.module, trainer.config.train
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()) / 1e6
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    reading = statistics.median(times.reading) / statistics.median(bare)
    return (
        f"{model.config.model_type} of {parameters:.1f}M parameters, {trainer.saved['dtype']}, ZeRO stage "
        f"{trainer.engine.zero_optimization_stage()}, {trainer.world_size} ranks on {device}, torch "
        f"{torch.__version__}; {train.global_batch_size} rows of {trainer.data.seq_len} tokens a step. "
        f"{len(ours)} steps of each kind in blocks of {trainer.block} that take turns; a bare step takes "
        f"{statistics.median(bare) * 1e3:.0f} ms (median).\n\n"
        f"Trainer ÷ bare engine: **{middle:.3f}** (the goal is {GOAL}): the median of {len(times.bare)} blocks about "
        f"the bare block that follows, quartiles {low:.3f} to {high:.3f}. The ratio of the medians of all steps is "
        f"{ratio:.3f}. A step of the trainer is all from the end of the one before to its own end, without validation "
        f"and checkpoints. Reading a batch takes {reading:.3f} of a bare step, in a thread beside it.\n"
    )


@command
def main(argv: list[str] | None = None) -> int:
    """Train the run, then write what it cost beside the engine."""
    parser = make_parser("benchmarks/trainer.py", __doc__)
    parser.add_argument("--config", required=True, help="run configuration")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero2.json", help="default: %(default)s")
    parser.add_argument("--block", type=int, default=4, help="steps of one kind in a row; default: %(default)s")
    parser.add_argument("--write", type=Path, default=Path(__file__).with_suffix(".md"), help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=200")
    args = parser.parse_args(argv)
    trainer = make_trainer(args)
    trainer.block = args.block
    code = trainer.run()
    if trainer.rank == 0 and code == 0:
        if len(trainer.times.bare) < 2:
            raise UserError(f"{trainer.steps} steps are too few to measure; at least {3 * args.block} are needed")
        found = report(trainer)
        print(found)
        args.write.write_text(f"`torchrun benchmarks/trainer.py` wrote this.\n\n{found}", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
