"""What is trained: one file an objective, each with the methods of `pretrain.step.Objective`."""

from ..config import RunConfig
from ..step import Objective
from .autoregressive import Autoregressive
from .masked_diffusion import MaskedDiffusion

OBJECTIVES: dict[str, type] = {"masked_diffusion": MaskedDiffusion, "autoregressive": Autoregressive}


def make_objective(config: RunConfig, mask_token_id: int | None) -> Objective:
    """The objective that `config.objective` names."""
    return OBJECTIVES[config.objective](config, mask_token_id)
