"""The run configuration: a tree of dataclasses, each value with one owner, read from YAML and `key=value`.

DeepSpeed's JSON says "auto" for whatever stands here.
"""

from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal

from common.errors import UserError


@dataclass
class ModelConfig:
    base: str = "gpt2"  # causal LM: folder or Hub name, as for from_pretrained
    revision: str = "main"
    trust_remote_code: bool = False  # of the base
    mask_token: str = "<|mask|>"  # added to the tokenizer where mask_token_id is null
    mask_token_id: int | None = None  # an existing id to use as the mask instead
    attention: str = "auto"  # auto | flash_attn | varlen | flex | sdpa: see pretrain/model/attention.py
    loss: str = "auto"  # auto | chunked | liger | plain: see pretrain/model/loss.py
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the device is fast at it
    # Compute activations again in the backward pass: of whole blocks, or of all but matrix products and attention.
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    compile: bool = False  # torch.compile each block
    liger: bool = False  # fused RMSNorm, SwiGLU and RoPE of the package liger-kernel, on CUDA
    # The base's shape, as in its config.json: lets --dry_run work offline, and is checked against the base.
    architecture: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    path: str = "data/demo"  # a folder made by `python -m data_prep prepare`
    isolate_documents: bool = False  # documents of a row do not see each other; positions restart
    weights: dict[str, float] = field(default_factory=dict)  # mixture; default: the manifest's
    verify: Literal["auto", "sha256", "size"] = "auto"  # at the start; auto: sha256 up to 4 GB


@dataclass
class DiffusionConfig:
    eps: float = 1e-3  # smallest time
    # Loss per masked token (the authors' code) or per maskable token (the NELBO), of the global batch.
    normalize_by: Literal["masked", "maskable"] = "masked"
    # t of each sample: independent (the paper's), one in each of as many equal parts of (eps, 1) as the global batch
    # has rows, or pairs: each sample twice in a batch, with a mask and its complement, t and 1 - t.
    times: Literal["independent", "stratified", "complementary"] = "independent"


@dataclass
class AnnealingConfig:
    # Between causal and bidirectional, beside all of the past, a position sees: each future one with a probability
    # (the paper's), the next k, or the rest of its block. none: bidirectional from the first step.
    form: Literal["bernoulli", "window", "block", "none"] = "bernoulli"
    steps: int = 10_000  # from causal to bidirectional
    schedule: Literal["linear", "cosine", "stepwise"] = "linear"
    stages: int = 8  # of stepwise: distinct masks


@dataclass
class TrainConfig:
    steps: int = 1000  # optimizer steps
    tokens: int | None = None  # ends the run earlier, where steps × batch is more
    seq_len: int | None = None  # tokens a row, checked against the shards; null: whatever they have
    seed: int = 42
    global_batch_size: int = 256  # rows an optimizer step
    micro_batch_size: int = 8  # rows a forward pass of one rank
    exit_interval: int = 0  # save and exit after this many steps of one launch; 0: run to the end
    max_minutes: float = 0  # validate, save and exit after this many minutes of one launch; 0: no limit


@dataclass
class OptimizerConfig:
    lr: float = 3e-4  # peak
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; not of biases and norms
    max_grad_norm: float = 1.0
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_steps: int = 2000
    min_lr_ratio: float = 0.1  # of the peak, at the end of cosine and wsd
    decay_fraction: float = 0.1  # of the steps, wsd's final decay


@dataclass
class CheckpointConfig:
    every: int = 1000  # steps; 0: only at the end
    keep: int = 2  # newest checkpoints kept; 0: save none
    keep_every: int = 0  # steps whose multiples are kept for good; 0: none
    allow_changes: bool = False  # resume although the configuration computes something else


@dataclass
class ValidationConfig:
    every: int = 1000  # steps; 0: only at start and end
    rows: int = 64  # validation rows a source, on noise that never changes; 0: no validation
    times: list[float] = field(default_factory=list)  # also the masked CE at each of these t


@dataclass
class GuardConfig:
    max_skipped_in_a_row: int = 5  # steps with a non-finite loss or gradient before the run gives up
    # A spike: masked CE, compared within buckets of t, this many robust standard deviations above the last 64 steps,
    # for spike_steps steps in a row. 0: not looked for.
    spike_factor: float = 8.0
    spike_steps: int = 3
    on_spike: Literal["warn", "rollback"] = "warn"  # rollback: to the newest checkpoint, passing over those batches
    max_rollbacks: int = 3
    stall_minutes: float = 30  # in one phase of a step before a rank reports where all stand and leaves; 0: never


@dataclass
class WandbConfig:
    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "diffullama"
    name: str | None = None


@dataclass
class RunConfig:
    run_dir: str = "runs/default"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    annealing: AnnealingConfig = field(default_factory=AnnealingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches a rank and step. Raises UserError where the global batch does not divide."""
    train = config.train
    per_pass = train.micro_batch_size * world_size
    if train.global_batch_size % per_pass:
        raise UserError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{train.micro_batch_size} × {world_size} ranks = {per_pass}; "
            f"try global_batch_size={ceil(train.global_batch_size / per_pass) * per_pass} or another micro_batch_size"
        )
    return train.global_batch_size // per_pass


def total_steps(config: RunConfig, seq_len: int) -> int:
    """train.steps, or fewer where train.tokens ends the run before."""
    train = config.train
    if train.tokens is None:
        return train.steps
    return min(train.steps, ceil(train.tokens / (train.global_batch_size * seq_len)))


def check_run(config: RunConfig) -> None:
    """Raise UserError for values that cannot work together, before anything is loaded."""
    c = config
    positive = {
        "train.steps": c.train.steps,
        "train.global_batch_size": c.train.global_batch_size,
        "train.micro_batch_size": c.train.micro_batch_size,
        "optimizer.lr": c.optimizer.lr,
        "guards.max_skipped_in_a_row": c.guards.max_skipped_in_a_row,
        "guards.spike_steps": c.guards.spike_steps,
    }
    for name, value in positive.items():
        if value <= 0:
            raise UserError(f"{name} is {value}, expected more than 0")
    not_negative = {
        "checkpoint.every": c.checkpoint.every,
        "checkpoint.keep": c.checkpoint.keep,
        "checkpoint.keep_every": c.checkpoint.keep_every,
        "validation.rows": c.validation.rows,
        "train.max_minutes": c.train.max_minutes,
        "validation.every": c.validation.every,
        "annealing.steps": c.annealing.steps,
        "optimizer.warmup_steps": c.optimizer.warmup_steps,
        "optimizer.max_grad_norm": c.optimizer.max_grad_norm,
        "optimizer.weight_decay": c.optimizer.weight_decay,
        "train.seed": c.train.seed,
        "train.exit_interval": c.train.exit_interval,
        "guards.spike_factor": c.guards.spike_factor,
        "guards.max_rollbacks": c.guards.max_rollbacks,
        "guards.stall_minutes": c.guards.stall_minutes,
    }
    for name, value in not_negative.items():
        if value < 0:
            raise UserError(f"{name} is {value}, expected 0 or more")
    if c.train.tokens is not None and c.train.tokens <= 0:
        raise UserError(f"train.tokens is {c.train.tokens}, expected more than 0, or null")
    if c.diffusion.times == "complementary" and c.train.global_batch_size % 2:
        raise UserError(
            f"train.global_batch_size is {c.train.global_batch_size}; diffusion.times=complementary needs pairs"
        )
    if not 0 < c.diffusion.eps < 1:
        raise UserError(f"diffusion.eps is {c.diffusion.eps}, expected a time between 0 and 1")
    for name, value in (
        ("min_lr_ratio", c.optimizer.min_lr_ratio),
        ("decay_fraction", c.optimizer.decay_fraction),
    ):
        if not 0 <= value <= 1:
            raise UserError(f"optimizer.{name} is {value}, expected 0 to 1")
    if not all(0 < t <= 1 for t in c.validation.times):
        raise UserError(f"validation.times is {c.validation.times}, expected times above 0 and up to 1")
    if c.annealing.stages < 1:
        raise UserError(f"annealing.stages is {c.annealing.stages}, expected 1 or more")
    if c.annealing.form != "none" and c.annealing.steps == 0:
        raise UserError("annealing.steps is 0; for no annealing set annealing.form=none")
