import itertools

import numpy as np
import pytest
import torch

from pretrain.config import OptimizerConfig
from pretrain.optimization import learning_rate, parameter_groups


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_learning_rate(schedule):
    config = OptimizerConfig(lr=2.0, schedule=schedule, warmup_steps=5, min_lr_ratio=0.1, decay_fraction=0.2)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0])
    assert max(rates) == 2.0 and all(a >= b for a, b in itertools.pairwise(rates[5:]))
    final = {"cosine": 0.2, "constant": 2.0, "wsd": 0.2}[schedule]
    assert learning_rate(100, 100, config) == pytest.approx(final)
    if schedule == "cosine":
        halfway = 5 + 95 / 2
        assert learning_rate(halfway, 100, config) == pytest.approx(1.1)
    if schedule == "wsd":
        assert rates[5:80] == [2.0] * 75


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    decay, rest = parameter_groups(model, 0.1)
    assert decay["weight_decay"] == 0.1 and {p.ndim for p in decay["params"]} == {2}
    assert rest["weight_decay"] == 0.0 and {p.ndim for p in rest["params"]} == {1}
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))
