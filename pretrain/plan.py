"""What a run needs, from its configuration and, where they are here, its corpora's manifests: `--dry_run`.

Without launcher, weights or shards.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from common.errors import UserError

from .adapt import architecture_config
from .config import RunConfig, accumulation_steps, total_steps
from .corpora import folders, load_corpora, shown
from .data import TrainData
from .model.loss import CHUNK_BYTES
from .objectives import make_objective

GIB = 1 << 30


def shape_of(config: RunConfig) -> PretrainedConfig:
    """The base's configuration: from model.architecture where given, else from the base. Raises UserError."""
    if config.model.architecture:
        return architecture_config(config.model.architecture)
    try:
        return AutoConfig.from_pretrained(config.model.base, revision=config.model.revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the shape of {config.model.base!r} is not known offline: {str(error).splitlines()[0]}; "
            "give model.architecture"
        ) from None


def parameters(shape: PretrainedConfig) -> int:
    """Parameters of the causal LM, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    return sum(p.numel() for p in model.parameters())


def memory_per_rank(
    count: int, shape: PretrainedConfig, config: RunConfig, ds_config: dict, seq_len: int, world_size: int
) -> dict[str, float]:
    """Bytes a rank needs, by use.

    Model states as in "ZeRO" (arXiv 1910.02054), section 3.1: bf16 weights 2, gradients 2, fp32 master,
    momentum and variance 12 bytes a parameter, or 4, 4 and 8 in fp32; stage 1 divides the last over the
    ranks, 2 also the gradients, 3 also the weights. Activations as in "Reducing Activation Recomputation"
    (arXiv 2205.05198), flash attention: 34 L B H bytes a layer in bf16, or 2 L B H and one whole layer
    with full checkpointing, about 20 L B H with selective.
    Logits: fp32 values and their 16-bit copies of a chunk of the masked positions, and the head's fp32 gradient.
    """
    stage = ds_config["zero_optimization"]["stage"]
    bf16 = ds_config["bf16"]["enabled"]
    weights, gradients, optimizer = (2, 2, 12) if bf16 else (4, 4, 8)
    width = shape.hidden_size
    layers = shape.num_hidden_layers
    tokens = config.train.micro_batch_size * seq_len
    scale = 1 if bf16 else 2
    a_layer = 34 * tokens * width * scale
    kept = {"none": 34, "selective": 20, "full": 2}[config.model.activation_checkpointing]
    saved = layers * kept * tokens * width * scale + (a_layer if kept < 34 else 0)
    return {
        "weights": weights * count / (world_size if stage >= 3 else 1),
        "gradients": gradients * count / (world_size if stage >= 2 else 1),
        "optimizer": optimizer * count / (world_size if stage >= 1 else 1),
        "activations": saved,
        "logits": CHUNK_BYTES * 1.5 + 4 * shape.vocab_size * width,
    }


def planned_data(config: RunConfig) -> TrainData | None:
    """What a run will draw its rows from; None where a corpus is not here and train.seq_len says the rows' length.

    Raises UserError where the corpora do not fit each other or the configuration, or have too few rows.
    """
    absent = [folder for folder in folders(config.data.path) if not (Path(folder) / "manifest.json").exists()]
    if absent and config.train.seq_len is not None:
        return None
    load_corpora(config.data.path).check_length(config.train.seq_len)
    return TrainData.of_run(config, make_objective(config, mask_token_id=None).repeats)


def describe(
    config: RunConfig, ds_config: dict, shape: PretrainedConfig, data: TrainData | None, world_size: int
) -> str:
    """The dry run's page. `data` None: a corpus is not here, and train.seq_len says the rows' length."""
    count = parameters(shape)
    seq_len = data.seq_len if data else config.train.seq_len
    if seq_len is None:
        raise ValueError("without data, train.seq_len must say the rows' length")
    steps = total_steps(config, seq_len)
    per_step = config.train.global_batch_size * seq_len
    memory = memory_per_rank(count, shape, config, ds_config, seq_len, world_size)
    offload = ds_config["zero_optimization"].get("offload_optimizer")
    accumulation = accumulation_steps(config, world_size)
    annealing = config.annealing
    anneals = config.objective == "masked_diffusion" and annealing.form != "none"
    lines = [
        f"run            {config.run_dir}: {config.objective.replace('_', ' ')}",
        f"model          {config.model.base}: {count / 1e6:,.1f}M parameters, {shape.num_hidden_layers} layers × "
        f"{shape.hidden_size}, vocabulary {shape.vocab_size:,}"
        + (", new weights" if config.model.init == "random" else ""),
        f"data           {shown(config.data.path)}: {_epochs(data, steps * config.train.global_batch_size)}",
        f"rows           {seq_len} tokens",
        f"global batch   {config.train.global_batch_size} rows = {per_step:,} tokens a step: micro-batch "
        f"{config.train.micro_batch_size} × accumulation {accumulation} × {world_size} rank(s)",
        f"steps          {steps:,} = {steps * per_step / 1e9:,.2f}B tokens"
        + (f" (train.tokens ends it before step {config.train.steps:,})" if steps < config.train.steps else ""),
        "annealing      "
        + (f"{annealing.form} over {annealing.steps:,} steps, {annealing.schedule}" if anneals else "none"),
        f"learning rate  {config.optimizer.lr:g}, {config.optimizer.schedule}, "
        f"warm-up {config.optimizer.warmup_steps:,}",
        f"ZeRO           stage {ds_config['zero_optimization']['stage']}"
        + (", offloaded to host memory" if offload else "")
        + f", {'bf16 with fp32 masters' if ds_config['bf16']['enabled'] else 'fp32'}",
        "memory a rank  " + ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.items())
        + f" → {sum(memory.values()) / GIB:.1f} GiB, buffers and fragmentation not counted",
    ]  # fmt: skip
    return "\n".join(lines)


def _epochs(data: TrainData | None, rows: int) -> str:
    """What the run's rows are of each source."""
    if data is None:
        return "not here, so its rows are not counted"
    drawn = data.consumed(rows)
    total = sum(drawn.values())
    return ", ".join(
        f"{name} {drawn[name] / total:.1%}, {drawn[name] / len(source):,.2f} epochs"
        for name, source in zip(data.names, data.train)
    )
