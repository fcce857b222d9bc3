"""Learning rate as a function of the step, and which parameters decay."""

import math

import torch

from .config import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Rate of step 0 … steps-1: linear warm-up to `lr`, then the schedule down to lr × min_lr_ratio.

    cosine: half a period. constant. wsd (warm-up, stable, decay): constant, then linear over the last
    `decay_fraction` of the steps.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    low = config.min_lr_ratio
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
    if config.schedule == "wsd":
        decay = max(1, round(steps * config.decay_fraction))
        return config.lr * (1 - (1 - low) * min(1.0, max(0, step - (steps - decay)) / decay))
    return config.lr


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay; biases and norms do not. Reads true shapes under ZeRO-3."""
    decay, rest = [], []
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decay if len(shape) >= 2 else rest).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
