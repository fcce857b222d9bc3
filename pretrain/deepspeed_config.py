"""DeepSpeed's JSON with each "auto" replaced by the value that the run configuration owns."""

import json
from pathlib import Path
from typing import Any

from common.errors import UserError

from .config import RunConfig, accumulation_steps


def resolve(path: str | Path, config: RunConfig, dtype: str, hidden_size: int, world_size: int) -> dict:
    """The configuration for deepspeed.initialize.

    `dtype` is "fp32" or "bf16". Raises UserError for JSON that does not parse, a value that contradicts
    the run configuration, or an "auto" that nothing owns.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"no DeepSpeed configuration at {path} ({error.strerror}); see ds_configs/") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    optimizer = config.optimizer
    owned = {
        ("train_batch_size",): ("train.global_batch_size", config.train.global_batch_size),
        ("train_micro_batch_size_per_gpu",): ("train.micro_batch_size", config.train.micro_batch_size),
        ("gradient_accumulation_steps",): (
            "train.global_batch_size / (micro_batch_size × ranks)",
            accumulation_steps(config, world_size),
        ),
        ("gradient_clipping",): ("optimizer.max_grad_norm", optimizer.max_grad_norm),
        ("bf16", "enabled"): ("model.dtype", dtype == "bf16"),
        ("optimizer", "params", "lr"): ("optimizer.lr", optimizer.lr),
        ("optimizer", "params", "betas"): ("optimizer.betas", list(optimizer.betas)),
        ("optimizer", "params", "eps"): ("optimizer.eps", optimizer.eps),
        ("optimizer", "params", "weight_decay"): ("optimizer.weight_decay", optimizer.weight_decay),
    }
    for keys, (name, value) in owned.items():
        found = _get(content, keys)
        if found not in ("auto", None, value):
            raise UserError(
                f'{path}: {".".join(keys)} is {found}, but {name} gives {value}; write "auto" there, '
                "or make the two agree"
            )
        _set(content, keys, value)
    for key, reason in (("scheduler", "optimizer.schedule"), ("fp16", "model.dtype (fp32 or bf16)")):
        if content.get(key):
            raise UserError(f"{path}: remove {key}; {reason} of the run configuration owns it")
    zero = content.setdefault("zero_optimization", {"stage": 0})
    by_width = {  # the values of transformers' Trainer
        "reduce_bucket_size": hidden_size * hidden_size,
        "allgather_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, value in by_width.items():
        if zero.get(key) == "auto":
            zero[key] = value
    left = _autos(content)
    if left:
        raise UserError(f'{path}: nothing owns the "auto" of {", ".join(left)}; write a value')
    return content


def _get(content: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _set(content: Any, keys: tuple[str, ...], value) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
    content[keys[-1]] = value


def _autos(content, prefix: str = "") -> list[str]:
    if isinstance(content, dict):
        return [found for key, value in content.items() for found in _autos(value, f"{prefix}.{key}".lstrip("."))]
    return [prefix] if content == "auto" else []
