"""The loop: batch, forward, backward, step, log, sometimes validate, sometimes save.

In: a checked run configuration and DeepSpeed's. Out: RUN_DIR with metrics and checkpoints. A run that
stopped continues where its newest checkpoint stands.
"""

import math
import resource
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from common.errors import UserError
from common.log import log

from . import adapt, health
from .config import RunConfig, total_steps
from .data import TrainData
from .flops import peak_flops, step_flops
from .objectives import make_objective
from .optimization import learning_rate, parameter_groups
from .runtime.checkpoint import find_checkpoint, save_checkpoint
from .runtime.evaluation import Evaluation
from .runtime.guards import Guard, write_incident
from .runtime.metrics import MetricLogger, read_metrics
from .runtime.resume import find_resume_checkpoint, load_checkpoint, offload_device, write_run
from .runtime.stop import STOPPED, StopRequest
from .runtime.watchdog import Watchdog
from .step import Batch, read_step, train_step
from .validation import validate


def build_engine(config: RunConfig, base_config: Any, mask_token_id: int | None, ds_config: dict) -> Any:
    """The adapted model under DeepSpeed; ZeRO-3 partitions it while it loads."""
    zero3 = ds_config["zero_optimization"]["stage"] == 3
    keep = HfDeepSpeedConfig(ds_config) if zero3 else None  # transformers keeps only a weak reference
    dtype = torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32
    model = adapt.load_model(config.model, base_config, mask_token_id, dtype, seed=config.train.seed)
    del keep  # not before the model is loaded
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, config.optimizer.weight_decay),  # type: ignore[arg-type]
        config=ds_config,
    )
    return engine


def throughput(engine: Any, config: RunConfig, batch: Batch, length: int, seconds: float) -> dict[str, float]:
    """Tokens a second, also per rank, MFU where the device's peak is known, and the peak memory of rank 0."""
    tokens = config.train.global_batch_size * length
    world_size = dist.get_world_size()
    record = {"tokens_per_second": tokens / seconds, "tokens_per_second_per_gpu": tokens / seconds / world_size}
    peak = peak_flops(engine.device)
    if peak:
        share = batch.form.visible_share(length)
        needed = step_flops(engine.module, tokens, batch.counts["labelled"], length, share)
        record["mfu"] = needed / seconds / world_size / peak
        record["peak_memory_gib"] = torch.cuda.max_memory_allocated(engine.device) / 2**30
    else:
        record["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return record


class Trainer:
    """One launch of a run; all ranks make one together. `done` counts finished steps."""

    def __init__(self, config: RunConfig, base_config: Any, tokenizer: Any, mask_token_id: int | None, ds_config: dict):
        self.stop = StopRequest(config.train.max_minutes)
        self.config = config
        self.world_size = dist.get_world_size()
        self.rank = dist.get_rank()
        self.watchdog = Watchdog(config.run_dir, self.rank, self.world_size, config.guards.stall_minutes)
        self.objective = make_objective(config, mask_token_id)
        self.data = TrainData.of_run(config, self.objective.repeats)
        self.steps = total_steps(config, self.data.seq_len)
        self.tokens_per_step = config.train.global_batch_size * self.data.seq_len
        self.saved = {
            "dtype": "bf16" if ds_config["bf16"]["enabled"] else "fp32",
            "corpus": config.data.path,
            "corpus_fingerprint": self.data.fingerprint,
            "offload": offload_device(ds_config),
        }
        found = find_resume_checkpoint(config, ds_config, self.data.fingerprint)
        self.watchdog.at(0, "loading")
        self.engine = build_engine(config, base_config, mask_token_id, ds_config)
        adapt.describe_model(self.engine.module.config, self.objective.shipped(self.data.tokenizer))
        self.done = load_checkpoint(self.engine, found)
        if self.rank == 0:  # not before the checkpoint fits: the folder stays as it was
            write_run(config, tokenizer, self.engine.module.config)
        state = found[1].get("guard") if found else None
        self.guard = Guard.restored(config.guards, self.objective.reported.compared, state)
        self.metrics = MetricLogger(config, self.done, self.steps, enabled=self.rank == 0)
        self.evaluation = Evaluation(config, self.metrics, self.done, enabled=self.rank == 0)
        if self.done:
            how = "complete at" if self.done >= self.steps else "resuming from"
            log.info("%s: %s step %d of %d", config.run_dir, how, self.done, self.steps)

    def run(self) -> int:
        """Train to the end; returns the exit code: STOPPED where a signal or the clock ended it before, else 0.

        Raises UserError where guards.max_skipped_in_a_row or guards.max_rollbacks end it.
        """
        if self.done == 0:
            self.metrics.log({"step": 0, "tokens": 0, **self._validated(base=True)})
        self.evaluation.start()
        interval = self.config.train.exit_interval
        end = min(self.steps, self.done + interval) if interval else self.steps
        stopping = 0
        with ThreadPoolExecutor(1) as reader:  # the next step's data are read while this one computes
            upcoming = self._read(reader)
            while self.done < end and not stopping:
                self.watchdog.at(self.done, "data")
                began = time.perf_counter()
                batches = upcoming.result()
                waited = time.perf_counter() - began
                upcoming = self._read(reader, ahead=1)
                lr = learning_rate(self.done, self.steps, self.config.optimizer)
                metrics = train_step(
                    self.engine, self.objective, batches, lr, self.stop.requested,
                    lambda phase: self.watchdog.at(self.done, phase),
                )  # fmt: skip
                stopping = metrics.pop("stop")
                verdict = self.guard.check(metrics)
                seconds = time.perf_counter() - began
                self.done += 1
                if verdict == "spike" and self._rolled_back():
                    upcoming = self._read(reader)
                    continue
                self._log(metrics, batches[0], seconds, waited, validates=stopping == StopRequest.CLOCK)
                if verdict in ("skipped", "stop"):
                    self._report_skipped(verdict)
                self._save_if_due(last=self.done == end or bool(stopping))
        self._finish(stopping)
        return STOPPED if stopping and self.done < self.steps else 0

    def _read(self, reader: ThreadPoolExecutor, ahead: int = 0) -> Future[list[Batch]]:
        """This rank's micro-batches of the step in hand, or of the one `ahead`."""
        train = self.config.train
        step = self.done + ahead
        first = self.guard.batch(step) * train.global_batch_size
        numbers = range(first, first + train.global_batch_size)
        return reader.submit(
            read_step, self.data, self.objective, step, numbers, self.rank, self.world_size,
            train.micro_batch_size, self.config.data.isolate_documents,
        )  # fmt: skip

    def _log(self, metrics: dict, batch: Batch, seconds: float, waited: float, validates: bool) -> None:
        """Write the finished step's metrics, after a validation where one is due."""
        record = {"step": self.done, "tokens": self.done * self.tokens_per_step, **metrics}
        record["skipped_steps"] = self.guard.skipped
        record |= throughput(self.engine, self.config, batch, self.data.seq_len, seconds)
        record |= {"step_seconds": seconds, "data_wait": waited / seconds}
        every = self.config.validation.every
        if self.done == self.steps or validates or (every and self.done % every == 0):
            record |= self._validated()
        self.metrics.log(record)
        self.evaluation.look(self.done, stopping=bool(self.stop.reason))

    def _validated(self, base: bool = False) -> dict[str, float]:
        """Held-out losses; at step 0 (`base`) also what they are compared with."""
        rows = self.config.validation.rows
        if not rows:
            return {}
        self.watchdog.at(self.done, "validation")
        found = validate(
            self.engine, self.objective, self.data, rows, self.config.train.micro_batch_size,
            self.config.data.isolate_documents, base and self.config.model.init == "base",
        )  # fmt: skip
        return found | ({"uniform_ce": math.log(self.engine.module.config.vocab_size)} if base else {})

    def _save_if_due(self, last: bool) -> None:
        """Save when due, but not during a spike or skipped steps, so that good checkpoints are not rotated out.

        At the end of a launch always.
        """
        c = self.config.checkpoint
        if not c.keep or not (last or (self.guard.stable and c.every and self.done % c.every == 0)):
            return
        self.watchdog.at(self.done, "checkpoint")
        position = (self.guard.batch(self.done - 1) + 1) * self.config.train.global_batch_size
        state = {
            **self.saved,
            "tokens": self.done * self.tokens_per_step,
            "rows": self.data.consumed(position),
            "guard": self.guard.state(),
        }
        save_checkpoint(self.engine, self.config.run_dir, c, self.done, state)

    def _report_skipped(self, verdict: str) -> None:
        """Say that the last step made no update; raise UserError where that has been so too often."""
        run_dir = self.config.run_dir
        batch = self.guard.batch(self.done - 1)
        self._write_incident("non-finite loss or gradient", batch, batch)
        log.warning(
            "step %d had a non-finite loss or gradient; no update was made (%d in all), its rows are in "
            "%s/incidents.jsonl", self.done, self.guard.skipped, run_dir,
        )  # fmt: skip
        if verdict == "stop":
            self._conclude()
            raise UserError(
                f"{self.guard.in_a_row} steps in a row had a non-finite loss or gradient, the last was step "
                f"{self.done}; the checkpoints in {run_dir}/checkpoints are from before. Look at "
                f"{run_dir}/incidents.jsonl; try a smaller optimizer.lr or more optimizer.warmup_steps"
            )

    def _rolled_back(self) -> bool:
        """After a spike: whether the run was taken back to a checkpoint. Raises UserError where that was too often."""
        guards = self.config.guards
        last = self.done - 1
        first = last - guards.spike_steps + 1
        batches = self.guard.batch(first), self.guard.batch(last)
        self._write_incident("loss spike", *batches)
        about = (
            f"steps {first + 1} to {self.done} have losses more than {guards.spike_factor:g} deviations above before"
        )
        if guards.on_spike == "warn":
            log.warning("%s; their rows are in %s/incidents.jsonl", about, self.config.run_dir)
            return False
        if self.guard.rollbacks >= guards.max_rollbacks:
            self._conclude()
            raise UserError(f"{about}, after guards.max_rollbacks={guards.max_rollbacks} rollbacks")
        self.watchdog.at(self.done, "rollback")
        found = find_checkpoint(self.config.run_dir, at_most=first, world_size=self.world_size)
        if found is None:
            log.warning("%s, and there is no checkpoint from before to roll back to", about)
            return False
        self.guard.skip_batches(*batches)
        self.done = load_checkpoint(self.engine, found)
        self.metrics.rewind(self.done)
        self.evaluation.rewind(self.done)
        log.warning("%s; back to step %d, passing over batches %d to %d", about, self.done, *batches)
        return True

    def _write_incident(self, kind: str, first: int, last: int) -> None:
        if self.rank == 0:
            size = self.config.train.global_batch_size
            rows = [self.data.describe(n) for n in range(first * size, (last + 1) * size)]
            write_incident(self.config.run_dir, kind, self.done, [first, last], rows)

    def _finish(self, stopping: int) -> None:
        """End the run, and all that goes on beside it, on every rank."""
        if stopping and self.done < self.steps:
            reason = self.stop.reason or "another rank"
            log.info("%s asked to stop; saved step %d of %d", reason, self.done, self.steps)
        if self.done < self.steps or not self.evaluation.running:
            self._conclude()
        self.watchdog.at(self.done, "waiting for the others to end")
        dist.barrier()  # a launcher kills the others when one leaves with a code
        self.watchdog.close()

    def wait_for_evaluation(self) -> None:
        """After `run`, and once this rank has left the others: wait for the last scores of a finished run."""
        if self.evaluation.running:
            self.evaluation.wait(self.stop.requested)
            self._conclude()

    def _conclude(self) -> None:
        """Close the metrics, and give the verdict on them."""
        self.evaluation.close()
        self.metrics.close()
        if self.rank == 0:
            found = read_metrics(self.config.run_dir)
            warmup = self.config.optimizer.warmup_steps
            log.info("%s", health.assess(found, self.steps, warmup, self.objective.reported))
