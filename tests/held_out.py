"""The held-out loss of an exported model, from its logits."""

from pathlib import Path

import torch

from common.config import load_config
from pretrain.config import RunConfig
from pretrain.data import TrainData
from pretrain.objectives import make_objective
from pretrain.step import read_rows
from tools.decoding import load


@torch.no_grad()
def held_out_nelbo(checkpoint: Path, run_dir: Path) -> float:
    """The NELBO of an exported model on the run's validation rows and noise, from its logits."""
    model, _ = load(str(checkpoint), device="cpu")
    config = load_config(RunConfig, run_dir / "config.yaml")
    places = TrainData(config.data.path, config.train.seed).held_out(config.validation.rows)
    rows = read_rows([(source, row) for source, row, *_ in places], [i for *_, i, _ in places], isolated=False)
    rows.totals = [total for *_, total in places]
    batch = next(make_objective(config, model.config.mask_token_id).held_out(rows, base=False)).batch
    weighted = 0.0
    for ids, labels, t in zip(batch.tensors["input_ids"], batch.tensors["labels"], batch.tensors["t"].tolist()):
        chosen = labels != -100
        scores = model(ids[None]).logits[0].double().log_softmax(-1)
        weighted -= scores[chosen].gather(1, labels[chosen, None]).sum().item() / t
    return weighted / batch.counts["maskable"]
