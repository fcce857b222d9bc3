"""DeepSpeed's engine replaced by one of thirty lines, and what a run with it has left behind."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from pretrain import trainer
from pretrain.config import RunConfig
from pretrain.optimization import parameter_groups
from pretrain.runtime.metrics import read_metrics, reproducible


class FakeEngine:
    """What the trainer calls of DeepSpeed's engine, on one process in fp32.

    Stage 0 neither reports a gradient norm nor looks at it; the other stages make no update where it is not finite.
    """

    device = torch.device("cpu")

    def __init__(self, model: torch.nn.Module, config: RunConfig, ds_config: dict):
        self.module = model
        self.passes = ds_config["gradient_accumulation_steps"]
        self.clipping = ds_config["gradient_clipping"]
        self.stage = ds_config["zero_optimization"]["stage"]
        self.optimizer = self.make_optimizer(parameter_groups(model, config.optimizer.weight_decay), config)
        self.micro_steps = 0
        self.norm, self.applied = 0.0, False
        self.seen = SimpleNamespace(gradients={}, lr=[])  # of the last update

    def make_optimizer(self, groups: list[dict], config: RunConfig) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=config.optimizer.lr, betas=config.optimizer.betas)

    def __call__(self, **inputs):
        return self.module(**inputs)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def zero_optimization_stage(self) -> int:
        return self.stage

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.micro_steps + 1) % self.passes == 0

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.passes).backward()

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            parameters = list(self.module.parameters())
            self.seen.gradients = {name: p.grad.clone() for name, p in self.module.named_parameters()}
            self.seen.lr = [group["lr"] for group in self.optimizer.param_groups]
            self.norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
            self.applied = self.stage == 0 or bool(np.isfinite(self.norm))
            if self.applied:
                if self.clipping:
                    torch.nn.utils.clip_grad_norm_(parameters, self.clipping)
                self.optimizer.step()
            self.optimizer.zero_grad()
        self.micro_steps += 1

    def get_global_grad_norm(self) -> float | None:
        return self.norm if self.stage else None

    def was_step_applied(self) -> bool:
        return self.applied

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        path = Path(folder) / tag
        path.mkdir()
        torch.save({"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}, path / "state.pt")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict]:
        path = Path(folder) / tag / "state.pt"
        state = torch.load(path)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return str(path), {}


class PlainDescent(FakeEngine):
    """Updates that are the learning rate times the gradient."""

    def make_optimizer(self, groups: list[dict], config: RunConfig) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": group["params"]} for group in groups], lr=config.optimizer.lr)


def weights(run: trainer.Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.engine.module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def numbers(run: trainer.Trainer) -> list[dict]:
    """The lines of metrics.jsonl, without what depends on the machine."""
    return [reproducible(line) for line in read_metrics(run.config.run_dir)]


def checkpoints(run: trainer.Trainer) -> list[int]:
    found = Path(run.config.run_dir).glob("checkpoints/step_*")
    return sorted(int(folder.name.removeprefix("step_")) for folder in found)


def described(run: trainer.Trainer, step: int) -> dict:
    return json.loads((Path(run.config.run_dir) / f"checkpoints/step_{step:08d}/checkpoint.json").read_text())


def incidents(run: trainer.Trainer) -> list[dict]:
    return [json.loads(line) for line in (Path(run.config.run_dir) / "incidents.jsonl").read_text().splitlines()]
