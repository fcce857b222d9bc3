"""The loop: batch, forward, backward, step, log, sometimes validate, sometimes save.

In: a checked run configuration and DeepSpeed's. Out: RUN_DIR with metrics and checkpoints. A run that
stopped continues where its newest checkpoint stands.
"""

import math
import os
import resource
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

from common.errors import UserError

from . import adapt, checkpoint
from .config import RunConfig, total_steps
from .data import StepData, TrainData, step_data
from .diffusion import BUCKETS, annealed_width, annealing_progress, bucket_means, bucket_sums, loss_weights
from .flops import peak_flops, step_flops, visible_share
from .guards import Guard, Watchdog, write_incident
from .model.visibility import Visibility
from .optimization import learning_rate, parameter_groups
from .telemetry import Telemetry
from .validation import references, validate

STOPS = 2  # kinds of StopRequest
STOPPED = 75  # exit code of a run that was asked to stop: the same command goes on


def build_engine(config: RunConfig, base_config, mask_token_id: int, ds_config: dict):
    """The adapted model under DeepSpeed; ZeRO-3 partitions it while it loads."""
    zero3 = ds_config["zero_optimization"]["stage"] == 3
    keep = HfDeepSpeedConfig(ds_config) if zero3 else None  # from_pretrained looks for a living one
    dtype = torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32
    model = adapt.load_model(config.model, base_config, mask_token_id, dtype)
    del keep
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, config.optimizer.weight_decay),
        config=ds_config,
    )
    return engine


def visibility_at(config: RunConfig, step: int, length: int) -> Visibility:
    """The annealed attention of a step for rows of `length`: the same on all ranks and for all rows."""
    annealing = config.annealing
    progress = annealing_progress(step, annealing.steps, annealing.schedule, annealing.stages)
    if annealing.form == "none" or progress >= 1:
        return Visibility("full")
    if annealing.form == "bernoulli":
        return Visibility("bernoulli", progress, key=(config.train.seed, step))
    return Visibility(annealing.form, progress, annealed_width(annealing.form, progress, length))


def train_step(
    engine,
    config: RunConfig,
    part: StepData,
    step: int,
    lr: float,
    stop: "StopRequest | int" = 0,
    watchdog: Watchdog | None = None,
) -> dict[str, float]:
    """One optimizer step on this rank's part of the global batch; returns metrics of the whole batch.

    `stop` in the metrics is not 0 on all ranks when it is on any: they leave the loop together.
    It is 2 where a signal asks for it, 1 where only the clock does. `update_skipped` is True, on all ranks, where a
    loss or gradient anywhere was not finite: then parameters and optimizer are as before.
    """
    at = watchdog.at if watchdog else lambda step, phase: None
    world, passes, device = dist.get_world_size(), len(part.batches), engine.device
    by_masked = config.diffusion.normalize_by == "masked"
    denominator = part.masked if by_masked else part.maskable
    state = visibility_at(config, step, part.batches[0].xt.shape[1])
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    # sums of nll/t and nll; ranks by why they want to stop; nll and number of masked tokens by bucket of t
    sums = torch.zeros(3 + STOPS + 2 * len(BUCKETS), dtype=torch.float64, device=device)
    by_bucket = sums[3 + STOPS :].view(2, -1)
    skipped = False
    for number, batch in enumerate(part.batches, 1):
        at(step, f"forward {number} of {passes}")
        batch = batch.to(device)
        output = engine(
            input_ids=batch.xt,
            labels=batch.labels,
            # DeepSpeed averages over ranks and passes; the denominator is already the global batch's
            loss_weights=loss_weights(batch.t, denominator) * (world * passes),
            position_ids=batch.positions,
            visibility=replace(state, documents=batch.documents),
        )
        at(step, f"backward {number} of {passes}")
        value = output.loss.detach()
        engine.backward(output.loss * (1 + (value - value)))  # a loss that is not finite gives such gradients
        plain_norm = unpartitioned_norm(engine)
        at(step, f"update after {number} of {passes}")
        if math.isfinite(plain_norm):  # at the other stages DeepSpeed itself makes no update otherwise
            engine.step()
        else:
            skipped = True
            engine.optimizer.step = lambda: None
            engine.step()
            del engine.optimizer.step
        nll = output.nll.double()
        sums[:2] += torch.stack([(nll / batch.t).sum(), nll.sum()])
        by_bucket += bucket_sums(nll, batch.t)
    sums[2 + int(stop)] = 1
    at(step, "metrics")
    dist.all_reduce(sums)
    weighted, unweighted, *stopping = sums[: 3 + STOPS].tolist()
    return {
        "loss": weighted / max(denominator, 1),
        "masked_ce": unweighted / max(part.masked, 1),
        "lr": lr,
        "grad_norm": float(engine.get_global_grad_norm() or plain_norm),
        "anneal_ratio": state.ratio,
        **({"right_context": state.width} if state.form == "window" else {}),
        **({"block_size": state.width} if state.form == "block" else {}),
        **bucket_means(by_bucket, "masked_ce"),
        "update_skipped": skipped or not engine.was_step_applied(),
        "stop": max(why for why, ranks in enumerate(stopping) if ranks),
    }


def unpartitioned_norm(engine) -> float:
    """Norm of the averaged gradients before clipping, which DeepSpeed does not report at stage 0 in fp32."""
    if engine.zero_optimization_stage() > 0 or not engine.is_gradient_accumulation_boundary():
        return 0.0
    return float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))


def speed(engine, config: RunConfig, step: int, masked: int, length: int, seconds: float) -> dict[str, float]:
    """Tokens a second, also per rank, MFU where the device's peak is known, and the peak memory of rank 0."""
    tokens, device = config.train.global_batch_size * length, engine.device
    record = {"tokens_per_second": tokens / seconds}
    record["tokens_per_second_per_gpu"] = record["tokens_per_second"] / dist.get_world_size()
    peak = peak_flops(device)
    if peak:
        state = visibility_at(config, step, length)
        share = visible_share(state.form, state.ratio, state.width, length)
        needed = step_flops(engine.module, tokens, masked, length, share)
        record["mfu"] = needed / seconds / dist.get_world_size() / peak
        record["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        record["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return record


def train(config: RunConfig, base_config, tokenizer, mask_token_id: int, ds_config: dict) -> int:
    """Run to the end, from the newest checkpoint if there is one. All ranks call it together.

    Returns the exit code: STOPPED where a signal or the clock ended it before its last step, else 0. Raises
    UserError where guards.max_skipped_in_a_row or guards.max_rollbacks end it.
    """
    return Trainer(config, base_config, tokenizer, mask_token_id, ds_config).run()


class Trainer:
    """One launch of a run. `done` counts finished steps; batches are the same as steps until a roll-back."""

    def __init__(self, config: RunConfig, base_config, tokenizer, mask_token_id: int, ds_config: dict):
        self.stop = StopRequest(config.train.max_minutes)
        self.config, self.world, self.rank = config, dist.get_world_size(), dist.get_rank()
        self.watchdog = Watchdog(config.run_dir, self.rank, self.world, config.guards.stall_minutes)
        self.data = TrainData(
            config.data.path,
            mask_token_id,
            seed=config.train.seed,
            weights=config.data.weights,
            isolated=config.data.isolate_documents,
            eps=config.diffusion.eps,
            times=config.diffusion.times,
            global_batch=config.train.global_batch_size,
        )
        self.steps = total_steps(config, self.data.seq_len)
        self.tokens_per_step = config.train.global_batch_size * self.data.seq_len
        self.saved = {
            "dtype": "bf16" if ds_config["bf16"]["enabled"] else "fp32",
            "corpus": config.data.path,
            "corpus_fingerprint": self.data.fingerprint,
            "offload": checkpoint.offload_of(ds_config),
        }
        found = checkpoint.resumption(config, ds_config, self.data.fingerprint, say=self._say_plainly)
        self.watchdog.at(0, "loading")
        self.engine = build_engine(config, base_config, mask_token_id, ds_config)
        special = self.data.tokenizer["special_ids"]
        self.engine.module.config.diffusion = {
            "shift": True,
            "eps": config.diffusion.eps,
            "normalize_by": config.diffusion.normalize_by,
            "start_token_id": special["bos"] if self.data.tokenizer["add_bos"] else special["eos"],
        }
        if self.rank == 0:
            checkpoint.write_run(config, tokenizer, self.engine.module.config)
        self.done = checkpoint.load(self.engine, found)
        self.guard = Guard.restored(config.guards, found[1].get("guard") if found else None)
        self.log = Telemetry(config, self.done, self.steps, enabled=self.rank == 0)
        if self.done:
            how = "complete at" if self.done >= self.steps else "resuming from"
            self.log.say(f"{config.run_dir}: {how} step {self.done} of {self.steps}")

    def run(self) -> int:
        if self.done == 0:
            self.log.log({"step": 0, "tokens": 0, **self._validated(), **self._references()})
        interval, stopping = self.config.train.exit_interval, 0
        end = min(self.steps, self.done + interval) if interval else self.steps
        with ThreadPoolExecutor(1) as reader:  # the next step's data are read while this one computes
            upcoming = self._read(reader)
            while self.done < end and not stopping:
                self.watchdog.at(self.done, "data")
                began = time.perf_counter()
                part = upcoming.result()
                waited = time.perf_counter() - began
                upcoming = self._read(reader, ahead=1)
                lr = learning_rate(self.done, self.steps, self.config.optimizer)
                metrics = train_step(self.engine, self.config, part, self.done, lr, self.stop, self.watchdog)
                stopping = metrics.pop("stop")
                verdict = self.guard.judge(metrics)
                seconds = time.perf_counter() - began
                self.done += 1
                if verdict == "spike" and self._rolled_back():
                    upcoming = self._read(reader)
                    continue
                record = {"step": self.done, "tokens": self.done * self.tokens_per_step, **metrics}
                record["skipped_steps"] = self.guard.skipped
                record |= speed(self.engine, self.config, self.done - 1, part.masked, self.data.seq_len, seconds)
                record |= {"step_seconds": seconds, "data_wait": waited / seconds}
                every, by_clock = self.config.validation.every, stopping == StopRequest.CLOCK
                if self.done == self.steps or by_clock or (every and self.done % every == 0):
                    record |= self._validated()
                self.log.log(record)
                if verdict in ("skipped", "stop"):
                    self._skipped(verdict)
                self._save_if_due(last=self.done == end or bool(stopping))
        if stopping and self.done < self.steps:
            reason = self.stop.reason or "another rank"
            self.log.say(f"{reason} asked to stop; saved step {self.done} of {self.steps}")
        self.log.close()
        self.watchdog.at(self.done, "waiting for the others to end")
        dist.barrier()  # a launcher kills the others when one leaves with a code
        self.watchdog.close()
        return STOPPED if stopping and self.done < self.steps else 0

    def _read(self, reader: ThreadPoolExecutor, ahead: int = 0) -> Future:
        """This rank's part of the batch of the step in hand, or of the one `ahead`."""
        shape, batch = self.config.train, self.guard.batch(self.done + ahead)
        return reader.submit(
            step_data, self.data, batch, shape.global_batch_size, shape.micro_batch_size, self.rank, self.world
        )

    def _validated(self) -> dict[str, float]:
        self.watchdog.at(self.done, "validation")
        v, micro = self.config.validation, self.config.train.micro_batch_size
        return validate(self.engine, self.data, v.rows, v.times, micro, self.engine.device) if v.rows else {}

    def _references(self) -> dict[str, float]:
        """What health is measured against."""
        v, micro = self.config.validation, self.config.train.micro_batch_size
        if not v.rows:
            return {}
        found = references(self.engine, self.data, v.rows, micro, self.engine.device)
        return {"uniform_ce": math.log(self.engine.module.config.vocab_size), **found}

    def _save_if_due(self, last: bool) -> None:
        """Not while numbers look wrong: the checkpoints from before must stay. At the end of a launch always."""
        c = self.config.checkpoint
        if not c.keep or not (last or (self.guard.calm and c.every and self.done % c.every == 0)):
            return
        self.watchdog.at(self.done, "checkpoint")
        position = (self.guard.batch(self.done - 1) + 1) * self.config.train.global_batch_size
        state = {
            **self.saved,
            "tokens": self.done * self.tokens_per_step,
            "rows": self.data.consumed(position),
            "guard": self.guard.state(),
        }
        checkpoint.save(self.engine, self.config, self.done, state)

    def _skipped(self, verdict: str) -> None:
        """Say that the last step made no update; raise UserError where that has been so too often."""
        batch = self.guard.batch(self.done - 1)
        self._incident("non-finite loss or gradient", batch, batch)
        self.log.say(
            f"warning: step {self.done} had a non-finite loss or gradient; no update was made "
            f"({self.guard.skipped} in all), its samples are in {self.config.run_dir}/incidents.jsonl"
        )
        if verdict == "stop":
            self.log.close()
            raise UserError(
                f"{self.guard.in_a_row} steps in a row had a non-finite loss or gradient, the last was step "
                f"{self.done}; the checkpoints in {self.config.run_dir}/checkpoints are from before. Look at "
                f"{self.config.run_dir}/incidents.jsonl; try a smaller optimizer.lr or more optimizer.warmup_steps"
            )

    def _rolled_back(self) -> bool:
        """After a spike: whether the run was taken back to a checkpoint. Raises UserError where that was too often."""
        guards, last = self.config.guards, self.done - 1
        first = last - guards.spike_steps + 1
        batches = self.guard.batch(first), self.guard.batch(last)
        self._incident("loss spike", *batches)
        about = (
            f"steps {first + 1} to {self.done} have losses more than {guards.spike_factor:g} deviations above before"
        )
        if guards.on_spike == "warn":
            self.log.say(f"warning: {about}; their samples are in {self.config.run_dir}/incidents.jsonl")
            return False
        if self.guard.rollbacks >= guards.max_rollbacks:
            self.log.close()
            raise UserError(f"{about}, after guards.max_rollbacks={guards.max_rollbacks} roll-backs")
        self.watchdog.at(self.done, "roll-back")
        found = checkpoint.find(self.config.run_dir, at_most=first, world_size=self.world, say=self._say_plainly)
        if found is None:
            self.log.say(f"warning: {about}, and there is no checkpoint from before to roll back to")
            return False
        self.guard.leave_out(*batches)
        self.done = checkpoint.load(self.engine, found)
        self.log.rewind(self.done)
        self.log.say(f"warning: {about}; back to step {self.done}, passing over batches {batches[0]} to {batches[1]}")
        return True

    def _incident(self, kind: str, first: int, last: int) -> None:
        if self.rank == 0:
            size = self.config.train.global_batch_size
            samples = [self.data.describe(n) for n in range(first * size, (last + 1) * size)]
            write_incident(self.config.run_dir, kind, self.done, [first, last], samples)

    def _say_plainly(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


class StopRequest:
    """SIGTERM, SIGUSR1 or the clock ask for a stop after the step in hand; a second signal stops at once.

    A signal within seconds of the first belongs to it: a scheduler signals the processes and their parents,
    which pass it on.
    """

    CLOCK, SIGNAL = 1, 2
    SAME = 2.0  # seconds

    def __init__(self, max_minutes: float):
        self.reason = ""
        self._deadline = time.monotonic() + max_minutes * 60 if max_minutes else float("inf")
        self._first = float("inf")  # when the first signal came
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._received)

    def _received(self, number: int, frame) -> None:
        if time.monotonic() - self._first > self.SAME:
            os._exit(128 + number)
        self._first = min(self._first, time.monotonic())
        self.reason = signal.Signals(number).name

    def __int__(self) -> int:
        if not self.reason and time.monotonic() > self._deadline:
            self.reason = "train.max_minutes"
        return 0 if not self.reason else self.CLOCK if self.reason == "train.max_minutes" else self.SIGNAL
