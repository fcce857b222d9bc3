"""The loop: batch, forward, backward, step, log, sometimes validate, sometimes save.

In: a checked run configuration and DeepSpeed's. Out: RUN_DIR with metrics and checkpoints. A run that
stopped continues where its newest checkpoint stands.
"""

import os
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

from . import adapt, checkpoint
from .config import RunConfig, total_steps
from .data import StepData, TrainData, step_data
from .diffusion import annealed_width, annealing_progress, loss_weights
from .flops import peak_flops, step_flops, visible_share
from .model.visibility import Visibility
from .optimization import learning_rate, parameter_groups
from .telemetry import Telemetry
from .validation import validate

STOPS = 2  # kinds of StopRequest
BUCKETS = (0.25, 0.5, 0.75, 1.0)  # upper ends: the training loss is flat over steps because t is random, not so here
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
    engine, config: RunConfig, part: StepData, step: int, lr: float, stop: "StopRequest | int" = 0
) -> dict[str, float]:
    """One optimizer step on this rank's part of the global batch; returns metrics of the whole batch.

    `stop` in the metrics is not 0 on all ranks when it is on any: they leave the loop together.
    It is 2 where a signal asks for it, 1 where only the clock does.
    """
    world, passes, device = dist.get_world_size(), len(part.batches), engine.device
    by_masked = config.diffusion.normalize_by == "masked"
    denominator = part.masked if by_masked else part.maskable
    state = visibility_at(config, step, part.batches[0].xt.shape[1])
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    # sums of nll/t and nll; ranks by why they want to stop; nll and number of masked tokens by bucket of t
    sums = torch.zeros(3 + STOPS + 2 * len(BUCKETS), dtype=torch.float64, device=device)
    by_bucket = sums[3 + STOPS :].view(2, -1)
    edges = torch.tensor(BUCKETS[:-1], device=device)
    for batch in part.batches:
        batch = batch.to(device)
        output = engine(
            input_ids=batch.xt,
            labels=batch.labels,
            # DeepSpeed averages over ranks and passes; the denominator is already the global batch's
            loss_weights=loss_weights(batch.t, denominator) * (world * passes),
            position_ids=batch.positions,
            visibility=replace(state, documents=batch.documents),
        )
        engine.backward(output.loss)
        plain_norm = unpartitioned_norm(engine)
        engine.step()
        nll = output.nll.double()
        sums[:2] += torch.stack([(nll / batch.t).sum(), nll.sum()])
        bucket = torch.bucketize(batch.t, edges)
        by_bucket[0].index_add_(0, bucket, nll)
        by_bucket[1].index_add_(0, bucket, torch.ones_like(nll))
    sums[2 + int(stop)] = 1
    dist.all_reduce(sums)
    weighted, unweighted, *stopping = sums[: 3 + STOPS].tolist()
    buckets = (by_bucket[0] / by_bucket[1].clamp(min=1)).tolist()
    return {
        "loss": weighted / max(denominator, 1),
        "masked_ce": unweighted / max(part.masked, 1),
        "lr": lr,
        "grad_norm": float(engine.get_global_grad_norm() or plain_norm),
        "anneal_ratio": state.ratio,
        **({"right_context": state.width} if state.form == "window" else {}),
        **({"block_size": state.width} if state.form == "block" else {}),
        **{f"masked_ce_to_t{edge:g}": ce for edge, ce, n in zip(BUCKETS, buckets, by_bucket[1].tolist()) if n},
        "stop": max(why for why, ranks in enumerate(stopping) if ranks),
    }


def unpartitioned_norm(engine) -> torch.Tensor | float:
    """Norm of the averaged gradients before clipping, which DeepSpeed does not report at stage 0 in fp32."""
    if engine.zero_optimization_stage() > 0 or not engine.is_gradient_accumulation_boundary():
        return 0.0
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


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

    Returns the exit code: STOPPED where a signal or the clock ended it before its last step, else 0.
    """
    stop = StopRequest(config.train.max_minutes)
    world, rank = dist.get_world_size(), dist.get_rank()
    shape = config.train
    data = TrainData(
        config.data.path,
        mask_token_id,
        seed=shape.seed,
        weights=config.data.weights,
        isolated=config.data.isolate_documents,
        eps=config.diffusion.eps,
        times=config.diffusion.times,
        global_batch=shape.global_batch_size,
    )
    steps = total_steps(config, data.seq_len)
    tokens_per_step = shape.global_batch_size * data.seq_len
    found = checkpoint.resumption(config, ds_config, say=lambda text: rank == 0 and print(text, flush=True))
    engine = build_engine(config, base_config, mask_token_id, ds_config)
    special = data.tokenizer["special_ids"]
    engine.module.config.diffusion = {
        "shift": True,
        "eps": config.diffusion.eps,
        "normalize_by": config.diffusion.normalize_by,
        "start_token_id": special["bos"] if data.tokenizer["add_bos"] else special["eos"],
    }
    if rank == 0:
        checkpoint.write_run(config, tokenizer, engine.module.config)
    start = checkpoint.load(engine, found)
    log = Telemetry(config, start, steps, enabled=rank == 0)
    if start:
        log.say(f"{config.run_dir}: {'complete at' if start >= steps else 'resuming from'} step {start} of {steps}")

    def validated(step: int) -> dict[str, float]:
        v = config.validation
        return validate(engine, data, v.rows, v.times, shape.micro_batch_size, engine.device) if v.rows else {}

    if start == 0:
        log.log({"step": 0, "tokens": 0, **validated(0)})
    end = min(steps, start + shape.exit_interval) if shape.exit_interval else steps
    saved = {"tokens": 0, "dtype": "bf16" if ds_config["bf16"]["enabled"] else "fp32", "corpus": config.data.path}

    with ThreadPoolExecutor(1) as reader:  # the next step's data are read while this one computes
        sizes = (shape.global_batch_size, shape.micro_batch_size, rank, world)
        upcoming, stopping, done = reader.submit(step_data, data, start, *sizes), 0, start
        for step in range(start, end):
            began = time.perf_counter()
            part, upcoming = upcoming.result(), reader.submit(step_data, data, step + 1, *sizes)
            waited = time.perf_counter() - began
            metrics = train_step(engine, config, part, step, learning_rate(step, steps, config.optimizer), stop)
            seconds = time.perf_counter() - began
            done = step + 1
            stopping = metrics.pop("stop")
            record = {"step": done, "tokens": done * tokens_per_step, **metrics}
            record |= speed(engine, config, step, part.masked, data.seq_len, seconds)
            record["data_wait"] = waited / seconds
            by_clock = stopping == StopRequest.CLOCK
            if done == steps or by_clock or (config.validation.every and done % config.validation.every == 0):
                record |= validated(done)
            log.log(record)
            last = done == end or stopping
            if config.checkpoint.keep and (last or (config.checkpoint.every and done % config.checkpoint.every == 0)):
                consumed = data.consumed(done * shape.global_batch_size)
                checkpoint.save(engine, config, done, {**saved, "tokens": record["tokens"], "rows": consumed})
            if stopping and done < steps:
                log.say(f"{stop.reason or 'another rank'} asked to stop; saved step {done} of {steps}")
                break
    log.close()
    dist.barrier()  # a launcher kills the others when one leaves with a code
    return STOPPED if stopping and done < steps else 0


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
