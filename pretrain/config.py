"""The run configuration: a tree of dataclasses, each value with one owner, read from YAML and `key=value`.

DeepSpeed's JSON says "auto" for whatever stands here. `setting` gives a field its bounds, and says whether a resumed
run may change it: all others decide what is computed.
"""

from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal

from common.config import check_bounds, setting
from common.errors import UserError

from .model.forms import ANNEALED


@dataclass
class ModelConfig:
    base: str = "gpt2"  # causal LM: folder or Hub name, as for from_pretrained
    # base: the base's weights. random: a new model of model.architecture, or else of the base's shape, that keeps
    # only the base's tokenizer.
    init: Literal["base", "random"] = "base"
    revision: str = "main"
    trust_remote_code: bool = False  # of the base
    mask_token: str = "<|mask|>"  # added to the tokenizer where mask_token_id is null; a diffusion base keeps its own
    mask_token_id: int | None = None  # an existing id to use as the mask instead
    attention: str = setting("auto", may_change=True)  # auto | flash_attn | varlen | flex | sdpa
    loss: str = setting("auto", may_change=True)  # auto | chunked | liger | plain
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the device is fast at it
    # Compute activations again in the backward pass: of whole blocks, or of all but matrix products and attention.
    activation_checkpointing: Literal["none", "full", "selective"] = setting("none", may_change=True)
    compile: bool = setting(False, may_change=True)  # torch.compile each block
    liger: bool = setting(False, may_change=True)  # fused RMSNorm, SwiGLU and RoPE of liger-kernel, on CUDA
    # The base's shape, as in its config.json: lets --dry_run work offline, and is checked against the base.
    # null: not checked, for another base with a ready configuration.
    architecture: dict[str, Any] | None = field(default_factory=dict)


@dataclass
class DataConfig:
    # A folder made by `python -m data_prep prepare`, a list of folders, or {folder: weight}, as in pretrain/corpora.py
    path: Any = setting("data/demo", may_change=True)
    isolate_documents: bool = False  # documents of a row do not see each other; positions restart
    weights: dict[str, float] = field(default_factory=dict)  # mixture, by source; default: the manifest's
    # By source: training shows no row more often, then the other sources go on; 0: no limit. Default: the manifest's
    max_epochs: dict[str, float] = field(default_factory=dict)
    # Shards at the start: hash them, compare their sizes, or hash them up to 4 GB (auto).
    verify: Literal["auto", "sha256", "size"] = setting("auto", may_change=True)


@dataclass
class DiffusionConfig:
    eps: float = setting(1e-3, above=0, below=1)  # smallest time
    # Keep the AR model's shift: hidden state i predicts token i + 1. Without it, token i itself.
    shift: bool = True
    # Loss per masked token (the authors' code) or per maskable token (the NELBO), of the global batch.
    normalize_by: Literal["masked", "maskable"] = "masked"
    # t of each row: independent (the paper's), one in each of as many equal parts of (eps, 1) as the global batch
    # has rows, or pairs: each row twice in a batch, with a mask and its complement, t and 1 - t.
    time_sampling: Literal["independent", "stratified", "complementary"] = setting(
        "independent", formerly="diffusion.times"
    )


@dataclass
class AnnealingConfig:
    # During annealing a position attends to its whole past plus, by form: each future position with a probability
    # (bernoulli, the paper's), the next k (window), or the rest of its block (block). none: bidirectional at once.
    form: str = "bernoulli"
    steps: int = setting(10_000, at_least=0)  # from causal to bidirectional
    schedule: Literal["linear", "cosine", "stepwise"] = "linear"
    stages: int = setting(8, at_least=1)  # of stepwise: distinct masks


@dataclass
class TrainConfig:
    steps: int = setting(1000, above=0)  # optimizer steps
    tokens: int | None = setting(None, above=0)  # ends the run earlier, where steps × batch is more
    seq_len: int | None = setting(None, at_least=2)  # tokens a row, checked against the shards; null: what they have
    seed: int = setting(42, at_least=0)
    global_batch_size: int = setting(256, above=0)  # rows an optimizer step
    micro_batch_size: int = setting(8, above=0, may_change=True)  # rows a forward pass of one rank
    exit_interval: int = setting(0, at_least=0, may_change=True)  # save and exit after this many steps; 0: run on
    max_minutes: float = setting(0, at_least=0, may_change=True)  # validate, save and exit after these; 0: no limit


@dataclass
class OptimizerConfig:
    lr: float = setting(3e-4, above=0)  # peak
    betas: tuple[float, float] = setting((0.9, 0.95), at_least=0, below=1)
    eps: float = 1e-8
    weight_decay: float = setting(0.1, at_least=0)  # of matrices; not of biases and norms
    max_grad_norm: float = setting(1.0, at_least=0)
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_steps: int = setting(2000, at_least=0)
    min_lr_ratio: float = setting(0.1, at_least=0, at_most=1)  # of the peak, at the end of cosine and wsd
    decay_fraction: float = setting(0.1, at_least=0, at_most=1)  # of the steps, wsd's final decay


@dataclass
class CheckpointConfig:
    every: int = setting(1000, at_least=0)  # steps; 0: only at the end
    keep: int = setting(2, at_least=0)  # newest checkpoints kept; 0: save none
    keep_every: int = setting(0, at_least=0)  # steps whose multiples are kept for good; 0: none
    allow_changes: bool = False  # resume although the configuration computes something else


@dataclass
class ValidationConfig:
    every: int = setting(1000, at_least=0)  # steps; 0: only at start and end
    rows: int = setting(64, at_least=0)  # validation rows a source, on noise that never changes; 0: no validation
    times: list[float] = setting([], above=0, at_most=1)  # also the masked CE at each of these t


@dataclass
class GuardConfig:
    max_skipped_in_a_row: int = setting(5, above=0)  # steps with a non-finite loss or gradient before the run gives up
    # A spike: a loss, compared within buckets of t, this many robust standard deviations above the last 64 steps,
    # for spike_steps steps in a row. 0: not looked for.
    spike_factor: float = setting(8.0, at_least=0)
    spike_steps: int = setting(3, above=0)
    on_spike: Literal["warn", "rollback"] = "warn"  # rollback: to the newest checkpoint, passing over those batches
    max_rollbacks: int = setting(3, at_least=0)
    # Minutes in one phase of a step before a rank reports where all ranks stand and exits. 0: never.
    stall_minutes: float = setting(30, at_least=0)


@dataclass
class WandbConfig:
    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "diffullama"
    name: str | None = None


@dataclass
class EvaluationConfig:
    """Tasks asked of checkpoints while the run goes on, by a process of its own: python -m tools.evaluate_run."""

    tasks: str = ""  # names with commas, as tools.evaluate takes them; empty: none
    every: int = setting(0, at_least=0)  # steps, a multiple of checkpoint.every; the last too. 0: never
    limit: int = setting(0, at_least=0)  # examples a task; 0: all
    data_dir: str | None = None  # folder of the tasks' files; null: the Hub
    likelihood: str | None = None  # as tools.evaluate's; null: its default
    draws: int | None = setting(None, above=0)  # of each likelihood; null: tools.evaluate's default
    # cpu: training has the GPUs of its node. cuda is for launch=false, on a node of its own.
    device: Literal["cpu", "cuda"] = "cpu"
    launch: bool = True  # rank 0 starts the process; false: another job is it, slurm/evaluate_run.sh
    # At the end of a finished run, rank 0 waits so long for what is still to be evaluated. 0: not at all.
    wait_minutes: float = setting(30, at_least=0)


@dataclass
class RunConfig:
    run_dir: str = setting("runs/default", may_change=True)
    objective: Literal["masked_diffusion", "autoregressive"] = "masked_diffusion"
    model: ModelConfig = setting(ModelConfig)
    data: DataConfig = setting(DataConfig)
    diffusion: DiffusionConfig = setting(DiffusionConfig)
    annealing: AnnealingConfig = setting(AnnealingConfig)
    train: TrainConfig = setting(TrainConfig)
    optimizer: OptimizerConfig = setting(OptimizerConfig)
    checkpoint: CheckpointConfig = setting(CheckpointConfig, may_change=True)
    validation: ValidationConfig = setting(ValidationConfig, may_change=True)
    evaluation: EvaluationConfig = setting(EvaluationConfig, may_change=True)
    guards: GuardConfig = setting(GuardConfig, may_change=True)
    wandb: WandbConfig = setting(WandbConfig, may_change=True)


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
    check_bounds(config)
    _check_evaluation(config)
    if config.objective != "masked_diffusion":
        return  # what follows are its settings
    forms = ("none", *ANNEALED)
    if config.annealing.form not in forms:
        raise UserError(f"annealing.form is {config.annealing.form!r}, expected one of {', '.join(forms)}")
    if config.annealing.form != "none" and config.annealing.steps == 0:
        raise UserError("annealing.steps is 0; for no annealing set annealing.form=none")
    if config.diffusion.time_sampling == "complementary" and config.train.global_batch_size % 2:
        raise UserError(
            f"train.global_batch_size is {config.train.global_batch_size}; "
            "diffusion.time_sampling=complementary needs pairs"
        )
    if config.diffusion.time_sampling == "complementary" and config.diffusion.eps >= 0.5:
        raise UserError(f"diffusion.eps is {config.diffusion.eps}; complementary times t and 1 - t need less than 0.5")


def _check_evaluation(config: RunConfig) -> None:
    """Checkpoints must be there to be evaluated. Whether there are such tasks, the evaluating process says."""
    asked, saved = config.evaluation, config.checkpoint
    if not asked.tasks and not asked.every:
        return
    if not asked.tasks:
        raise UserError(f"evaluation.every is {asked.every}, but evaluation.tasks names no task; try lambada,piqa")
    if not asked.every:
        raise UserError(f"evaluation.tasks is {asked.tasks!r}, but evaluation.every is 0 steps; set both or neither")
    if not saved.keep:
        raise UserError("evaluation.every needs checkpoints, but checkpoint.keep is 0; set it to 1 or more")
    if not saved.every or asked.every % saved.every:
        raise UserError(
            f"evaluation.every is {asked.every}, expected a multiple of checkpoint.every, which is {saved.every}; "
            f"try checkpoint.every={asked.every}"
        )
