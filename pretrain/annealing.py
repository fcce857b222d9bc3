"""From causal to bidirectional attention over the first steps: which form of visibility a step has."""

import math

from .config import AnnealingConfig
from .model.forms import ANNEALED, Form, Full


def annealing_progress(step: int, steps: int, schedule: str = "linear", stages: int = 8) -> float:
    """Progress from causal (0) to bidirectional (1) at a step, counted from 0; 1 where `steps` is 0.

    `linear`: min(1, (step + 1) / steps), as in the paper. `cosine`: slow at both ends. `stepwise`: linear, rounded
    up to multiples of 1/`stages`, so that there are few distinct masks.
    """
    if steps <= 0:
        return 1.0
    linear = min(1.0, (step + 1) / steps)
    if schedule == "cosine":
        return (1 - math.cos(math.pi * linear)) / 2
    return math.ceil(linear * stages) / stages if schedule == "stepwise" else linear


def annealed_form(config: AnnealingConfig, step: int, length: int, seed: int) -> tuple[Form, float]:
    """(form, progress) of an optimizer step for rows of `length`: the same on all ranks and for all rows."""
    progress = annealing_progress(step, config.steps, config.schedule, config.stages)
    if config.form == "none" or progress >= 1:
        return Full(), 1.0
    return ANNEALED[config.form].at(progress, length, (seed, step)), progress
