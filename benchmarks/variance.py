"""How much noisier is one gradient than another: times independent, stratified, in complementary pairs.

    python benchmarks/variance.py CORPUS --base CHECKPOINT_FOLDER [--batches 48]

The gradient of a global batch, at equal forward passes, over many batches: the trace of its covariance. A
small model is enough; `--base` is any causal LM that the corpus was prepared for.
"""

import argparse
from pathlib import Path

import torch

from pretrain import adapt
from pretrain.config import ModelConfig
from pretrain.data import TrainData, step_data
from pretrain.diffusion import loss_weights

TIMES = ("independent", "stratified", "complementary")


def trace_of_covariance(model, data: TrainData, batches: int, rows: int) -> tuple[float, float]:
    """(trace of the covariance of a batch's gradient, variance of its loss), over batches of the run's beginning."""
    total, squares, losses = None, 0.0, []
    for step in range(batches):
        part = step_data(data, step, rows, rows, 0, 1)
        batch = part.batches[0]
        output = model(input_ids=batch.xt, labels=batch.labels, loss_weights=loss_weights(batch.t, part.maskable))
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(output.loss, list(model.parameters()))]).double()
        total = gradient if total is None else total + gradient
        squares += gradient.square().sum().item()
        losses.append(output.loss.item())
    return (squares - total.square().sum().item() / batches) / (batches - 1), torch.tensor(losses).var().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="a folder made by data_prep")
    parser.add_argument("--base", required=True)
    parser.add_argument("--batches", type=int, default=48)
    parser.add_argument("--rows", type=int, default=16, help="of a global batch")
    args = parser.parse_args()
    torch.manual_seed(0)
    settings = ModelConfig(base=args.base)
    tokenizer = adapt.load_tokenizer(settings)
    mask = adapt.add_mask_token(tokenizer, settings)
    base = adapt.base_config(settings, TrainData(args.corpus, mask, 0).seq_len)
    model = adapt.load_model(settings, base, mask, torch.float32)
    lines = [
        "| diffusion.times | gradient variance | of independent | loss variance | of independent |",
        "| --- | --- | --- | --- | --- |",
    ]
    first = None
    for times in TIMES:
        data = TrainData(args.corpus, mask, 7, times=times, global_batch=args.rows)
        found = trace_of_covariance(model, data, args.batches, args.rows)
        first = first or found
        lines.append(
            f"| {times} | {found[0]:.4g} | {found[0] / first[0]:.2f} | {found[1]:.4g} | {found[1] / first[1]:.2f} |"
        )
        print(lines[-1], flush=True)
    about = f"{Path(args.base).name}, {args.batches} batches of {args.rows} rows of {data.seq_len} tokens, NELBO."
    text = "\n".join([about, "", *lines]) + "\n"
    Path(__file__).with_suffix(".md").write_text(f"`python benchmarks/variance.py` wrote this.\n\n{text}")


if __name__ == "__main__":
    main()
