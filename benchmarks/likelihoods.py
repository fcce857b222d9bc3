"""Which estimator of a likelihood varies least at equal model calls.

    python benchmarks/likelihoods.py runs/demo/step_33
    python benchmarks/likelihoods.py CHECKPOINT --targets 12 --seeds 20 --draws 8 32

Targets are the continuations of tales after 16 tokens; each is scored once a seed with each estimator and number of
draws. Writes likelihoods.md to runs/, or where --output says: the mean in nats a token, the standard deviation over
seeds (root mean square over targets), what the estimator itself says of it, and both beside the first's.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pretrain.model.settings import SamplingSettings
from tools.decoding import load
from tools.evaluation.diffusion_lm import DiffusionLM, Likelihood
from tools.evaluation.harness import Answers, Asked

TALES = Path(__file__).resolve().parents[1] / "data_prep" / "demo" / "tales.jsonl"
NAMES = ("mask_count", "nelbo", "dream")  # dream also scores other things: an end of text after the target


def targets_of(tokenizer: Any, count: int, lengths: Sequence[int]) -> list[tuple[str, str]]:
    """(context, target) from the beginnings of tales spread over the file, targets of these lengths in turn."""
    lines = TALES.read_text(encoding="utf-8").splitlines()
    found = []
    for k in range(count):
        ids = tokenizer(json.loads(lines[k * len(lines) // count])["text"])["input_ids"]
        end = 16 + lengths[k % len(lengths)]
        found.append((tokenizer.decode(ids[:16]), tokenizer.decode(ids[16:end])))
    return found


def row(
    name: str, values: np.ndarray, errors: np.ndarray, tokens: np.ndarray, first: float | None
) -> tuple[str, float]:
    """(a line of the table, the standard deviation); `values` and `errors` (seeds, targets), `tokens` (targets,)."""
    each = values / tokens
    spread = float(np.sqrt(each.var(axis=0, ddof=1).mean()))
    said = float(np.sqrt(((errors / tokens) ** 2).mean()))
    ratio = "" if first is None else f"{(spread / first) ** 2:.2f}"
    return f"| {name} | {-each.mean():.3f} | {spread:.3f} | {said:.3f} | {ratio} |", spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 16, 32], help="tokens of the targets, in turn")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--draws", type=int, nargs="+", default=[8])
    parser.add_argument("--output", type=Path, default=Path("runs/likelihoods.md"))
    args = parser.parse_args()
    model, tokenizer = load(args.checkpoint)
    pairs = targets_of(tokenizer, args.targets, args.lengths)
    answers = Answers(args.output.with_suffix(".answers"))
    lines = [f"`python benchmarks/likelihoods.py {' '.join(sys.argv[1:])}`"]
    for draws in args.draws:
        lines += ["", f"### {draws} model calls a target, {args.targets} targets, {args.seeds} seeds", ""]
        lines += ["| likelihood | nats a token | standard deviation | as it says itself | variance ÷ the first's |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        first = None
        for name in NAMES:
            found = []
            for seed in tqdm(range(args.seeds), desc=f"{name}, {draws} draws"):
                likelihood = Likelihood(name, draws, seed)
                lm = DiffusionLM(model, tokenizer, answers, likelihood, SamplingSettings(), 4 * draws, progress=False)
                found.append(lm.score([Asked(context, target, greedy=False) for context, target in pairs]))
            values = np.array([[s.value for s in scores] for scores in found])
            errors = np.array([[s.stderr for s in scores] for scores in found])
            line, spread = row(name, values, errors, np.array([s.tokens for s in found[0]]), first)
            first = spread if first is None else first
            lines.append(line)
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
