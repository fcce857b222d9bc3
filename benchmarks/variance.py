"""How much noisier is one gradient than another: times independent, stratified, in complementary pairs.

    python benchmarks/variance.py CORPUS --base CHECKPOINT_FOLDER [--batches 48]

The gradient of a global batch, at equal forward passes, over many batches: the trace of its covariance. A
small model is enough; `--base` is any causal LM that the corpus was prepared for. Writes benchmarks/variance.md.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from common.cli import command, make_parser
from common.config import load_config
from pretrain import adapt
from pretrain.config import RunConfig
from pretrain.data import TrainData
from pretrain.objectives import make_objective
from pretrain.step import Objective, read_step

TIME_SAMPLING = ("independent", "stratified", "complementary")


def trace_of_covariance(
    model: Any, data: TrainData, objective: Objective, batches: int, rows: int
) -> tuple[float, float]:
    """(trace of the covariance of a batch's gradient, variance of its loss), over batches of the run's beginning."""
    parameters = list(model.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    squares, losses = 0.0, []
    for step in range(batches):
        [batch] = read_step(data, objective, step, range(step * rows, (step + 1) * rows))
        loss = objective.losses(model, batch).loss
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()
        total += gradient
        squares += gradient.square().sum().item()
        losses.append(loss.item())
    return (squares - total.square().sum().item() / batches) / (batches - 1), torch.tensor(losses).var().item()


@command
def main(argv: list[str] | None = None) -> int:
    """Measure each way to draw the times, and write the table."""
    parser = make_parser("benchmarks/variance.py", __doc__)
    parser.add_argument("corpus", help="a folder made by data_prep")
    parser.add_argument("--base", required=True)
    parser.add_argument("--batches", type=int, default=48)
    parser.add_argument("--rows", type=int, default=16, help="of a global batch")
    parser.add_argument("--write", type=Path, default=Path(__file__).with_suffix(".md"), help="default: %(default)s")
    args = parser.parse_args(argv)
    settings = [f"model.base={args.base}", "model.architecture=null", "annealing.form=none", "train.seed=7"]
    settings += ["diffusion.normalize_by=maskable", f"train.global_batch_size={args.rows}"]
    lines = [
        "| diffusion.time_sampling | gradient variance | of independent | loss variance | of independent |",
        "| --- | --- | --- | --- | --- |",
    ]
    model = first = None
    for sampling in TIME_SAMPLING:
        config = load_config(RunConfig, None, [*settings, f"diffusion.time_sampling={sampling}"])
        mask_token_id = adapt.add_mask_token(adapt.load_tokenizer(config.model), config.model)
        objective = make_objective(config, mask_token_id)
        data = TrainData(args.corpus, config.train.seed, repeats=objective.repeats)
        if model is None:
            shape = adapt.base_config(config.model, data.seq_len)
            model = adapt.load_model(config.model, shape, mask_token_id, torch.float32)
        found = trace_of_covariance(model, data, objective, args.batches, args.rows)
        first = first or found
        lines.append(
            f"| {sampling} | {found[0]:.4g} | {found[0] / first[0]:.2f} | {found[1]:.4g} | {found[1] / first[1]:.2f} |"
        )
        print(lines[-1], flush=True)
    about = f"{Path(args.base).name}, {args.batches} batches of {args.rows} rows of {data.seq_len} tokens, NELBO."
    text = "\n".join([about, "", *lines]) + "\n"
    args.write.write_text(f"`python benchmarks/variance.py` wrote this.\n\n{text}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
