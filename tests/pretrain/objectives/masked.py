"""Masked diffusion over rows of 24 tokens, for the tests of its noise and of its loss."""

import numpy as np
import torch
from independent import (
    Source,
)

from common.config import load_config
from pretrain import adapt
from pretrain.config import ModelConfig, RunConfig
from pretrain.model.modeling_diffullama import IGNORE
from pretrain.objectives import make_objective
from pretrain.objectives.masked_diffusion import MaskedDiffusion
from pretrain.step import Batch, read_rows

MASK = 384  # the token after the vocabulary of the tests
LENGTH = 24
WHOLE, SPLIT, PADDED = [LENGTH], [7, 1, 12, 4], [9, 6]
ROWS = [WHOLE, SPLIT, PADDED, WHOLE, [23, 1], PADDED]
TIMES = ["independent", "stratified", "complementary"]
SEED = 42  # of train.seed


def objective(*overrides: str) -> MaskedDiffusion:
    return make_objective(load_config(RunConfig, None, list(overrides)), MASK)


def batch_of(source: Source, *overrides: str, step: int = 0, isolated: bool = False) -> Batch:
    return objective(*overrides).batch(read_rows(source.places, source.numbers, isolated), step)


def times_of(batch: Batch) -> np.ndarray:
    return batch.tensors["t"].double().numpy()


def masked_in(batch: Batch) -> np.ndarray:
    return (batch.tensors["labels"] != IGNORE).numpy()


def model_of(folder, *overrides: str):
    """As a run makes it: the base with a mask token, and what the objective ships in its configuration."""
    chosen = ModelConfig(base=str(folder))
    model = adapt.load_model(chosen, adapt.base_config(chosen, LENGTH), MASK, torch.float32)
    special = {"special_ids": {"bos": 1, "eos": 0}, "add_bos": False}
    adapt.describe_model(model.config, objective(*overrides).shipped(special))
    return model.eval()
