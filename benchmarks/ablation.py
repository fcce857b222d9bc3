"""Does annealing help? A small language model is pretrained, then adapted in each way; writes benchmarks/ablation.*

    python benchmarks/ablation.py TEXT.jsonl [more.jsonl ...] --out runs/ablation
    python benchmarks/ablation.py TEXT.jsonl --model FOLDER --settings none window --rates 1e-4 3e-4

1. A BPE of 4,096 tokens is trained on the text; a LLaMA of 4 layers x 192 is pretrained with
   objective=autoregressive and exported. With --model, that causal LM is adapted instead.
2. Every form of annealing, none, and no shift are adapted from it for equal tokens, at each learning rate; the best
   rate of each (by masked CE at t = 0.5 on held-out text) runs on the other seeds. Variants of schedule, warm-up and
   clipping take the rate of their form.
3. benchmarks/ablation_report.py makes table and figure of what the runs wrote.

All training is pretrain/main.py's: this script writes configuration files to OUT/configs and reads metrics.jsonl.
Finished runs are kept in OUT and not run again.
"""

import argparse
import os
import random
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: find the project
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from benchmarks.ablation_report import Adapted, best_of, write_report
from benchmarks.inputs import llama, prepare_shards, read_texts, train_tokenizer
from common.cli import command, make_parser
from common.errors import UserError
from common.log import log
from pretrain.runtime.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
LENGTH, ROWS, VOCABULARY = 256, 8, 4096  # tokens a row, rows a batch, tokens of the tokenizer
TIMES = [0.15, 0.5, 0.9]
POINTS = 8  # validations a run, beside that at step 0


@dataclass
class Setting:
    """One way to adapt."""

    overrides: dict[str, Any]  # of the run configuration
    annealed: float = 0.5  # share of the steps that annealing takes
    rate_of: str | None = None  # take the best learning rate of that setting


def _variant(form: str, annealed: float = 0.5, **optimizer: float) -> Setting:
    overrides = {f"optimizer.{key}": value for key, value in optimizer.items()}
    return Setting({"annealing.form": form, **overrides}, annealed, rate_of=form)


SETTINGS = {
    "none": Setting({"annealing.form": "none"}),
    "bernoulli": Setting({"annealing.form": "bernoulli"}),
    "window": Setting({"annealing.form": "window"}),
    "block": Setting({"annealing.form": "block"}),
    "none, no shift": Setting({"annealing.form": "none", "diffusion.shift": False}),
    "window, first eighth": _variant("window", annealed=0.125),
    "window, whole run": _variant("window", annealed=1.0),
    "none, no warm-up": _variant("none", warmup_steps=0),
    "window, no warm-up": _variant("window", warmup_steps=0),
    "none, no clipping": _variant("none", max_grad_norm=1e9),
    "window, no clipping": _variant("window", max_grad_norm=1e9),
}


@dataclass
class Ablation:
    """What all runs of one comparison share. `out` holds shards/, configs/, runs/ and the exported base/."""

    out: Path
    steps: int  # of an adaptation
    rows: int  # held-out rows
    model: Path  # what is adapted
    tokenizer: Path
    began: float = field(default_factory=time.monotonic)

    def common(self, name: str) -> dict[str, Any]:
        """The settings of every run, by dotted name."""
        return {
            "run_dir": str(self.out / "runs" / name),
            "model.dtype": "fp32",
            "data.path": str(self.out / "shards"),
            "train.global_batch_size": ROWS,
            "train.micro_batch_size": ROWS,
            "validation.rows": self.rows,
            "guards.stall_minutes": 0,
            "wandb.mode": "disabled",
        }

    def pretrain(self, steps: int) -> None:
        """Train the base on next tokens and export it to OUT/base."""
        self.train(
            "base",
            steps,
            {
                "objective": "autoregressive",
                "model.base": str(self.tokenizer),
                "model.init": "random",
                "model.architecture": llama(192, 512, 4, 3, VOCABULARY, LENGTH),
                "train.seed": 0,
                "optimizer.lr": 3e-3,
                "optimizer.warmup_steps": 50,
                "checkpoint.every": 500,
                "checkpoint.keep": 1,
            },
        )
        if not self.model.exists():
            _execute(["-m", "tools.export", str(self.out / "runs" / "base"), str(self.model)], self.out / "export.log")

    def adapt(self, name: str, rate: float, seed: int) -> Adapted:
        """What one adaptation has come to."""
        setting = SETTINGS[name]
        run = f"{name.replace(', ', '-').replace(' ', '_')}-{rate:g}-{seed}"
        metrics = self.train(
            run,
            self.steps,
            {
                "objective": "masked_diffusion",
                "model.base": str(self.model),
                "model.architecture": None,  # the base's own
                "annealing.steps": max(1, round(setting.annealed * self.steps)),
                "train.seed": seed,
                "optimizer.lr": rate,
                "optimizer.warmup_steps": self.steps // 10,
                "checkpoint.keep": 0,
                "validation.times": TIMES,
                **setting.overrides,
            },
        )
        return Adapted.of(name, rate, seed, metrics, TIMES)

    def train(self, name: str, steps: int, settings: dict[str, Any]) -> list[dict]:
        """The metrics of a run through pretrain/main.py, which is started only where it has not finished."""
        settings = self.common(name) | {"train.steps": steps, "validation.every": ceil(steps / POINTS)} | settings
        path = self.out / "configs" / f"{name}.yaml"
        text = yaml.safe_dump(nested(settings), sort_keys=False)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(f"{path} belongs to a run with other settings; choose another --out, or delete {self.out}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        run_dir = Path(settings["run_dir"])
        metrics = read_metrics(run_dir)
        if not metrics or metrics[-1]["step"] < steps:
            run_dir.mkdir(parents=True, exist_ok=True)
            script, ds_config = ROOT / "pretrain" / "main.py", ROOT / "ds_configs" / "zero0.json"
            began = time.monotonic()
            _execute([str(script), "--config", str(path), "--deepspeed_config", str(ds_config)], run_dir / "log.txt")
            metrics = read_metrics(run_dir)
            losses = {
                key: value for key, value in metrics[-1].items() if key.startswith(("val_loss", "val_masked_ce_t0"))
            }
            log.info(
                "%s: %.0f s, %.1f min in all; %s", name, time.monotonic() - began, (time.monotonic() - self.began) / 60,
                ", ".join(f"{key} {value:.3f}" for key, value in losses.items()),
            )  # fmt: skip
        return metrics


def _execute(arguments: list[str], output: Path) -> None:
    """Run Python, its output in a file. Raises UserError with the last lines where it fails."""
    with open(output, "wb") as file:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        code = subprocess.run(
            [sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    if code:
        last = " | ".join(output.read_text(errors="replace").splitlines()[-3:])
        raise UserError(f"{shlex.join(arguments)} ended with {code}: {last}; see {output}")


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, last = key.split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return tree


def compare(ablation: Ablation, names: list[str], rates: list[float], seeds: list[int]) -> dict[str, list[Adapted]]:
    """The runs of each setting at its best rate, one a seed."""
    found: dict[str, list[Adapted]] = {}
    for name in names:
        like = SETTINGS[name].rate_of
        if like in found:
            rate = found[like][0].lr
        else:
            rate = best_of([ablation.adapt(name, rate, seeds[0]) for rate in rates]).lr
        found[name] = [ablation.adapt(name, rate, seed) for seed in seeds]
    return found


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line."""
    parser = make_parser("benchmarks/ablation.py", __doc__)
    parser.add_argument("text", nargs="+", help="JSONL with a field `text`")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="default: %(default)s")
    parser.add_argument("--model", type=Path, help="a causal LM with its tokenizer, to adapt instead of a new one")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--rates", nargs="+", type=float, default=[2.5e-4, 7e-4, 2e-3], help="default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="the first chooses the rate")
    parser.add_argument("--steps", type=int, default=100, help="of an adaptation; default: %(default)s")
    parser.add_argument("--base_steps", type=int, default=2000, help="of pretraining; default: %(default)s")
    parser.add_argument("--rows", type=int, default=96, help="held-out rows to validate on; default: %(default)s")
    parser.add_argument("--validation_fraction", type=float, default=0.01, help="of documents; default: %(default)s")
    parser.add_argument("--write", type=Path, default=Path(__file__).with_suffix(".md"), help="and a .png beside it")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    """Train what is missing, then write the report."""
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = args.model or args.out / "tokenizer"
    if not args.model and not tokenizer.exists():
        texts = read_texts(args.text)
        train_tokenizer(random.Random(0).sample(texts, min(len(texts), 1000)), VOCABULARY, tokenizer)
    prepare_shards(args.text, tokenizer, LENGTH, args.validation_fraction, args.out / "shards")
    ablation = Ablation(args.out, args.steps, args.rows, args.model or args.out / "base", tokenizer)
    if args.model:
        about = f"{args.model.name}, adapted"
    else:
        ablation.pretrain(args.base_steps)
        loss = read_metrics(args.out / "runs" / "base")[-1]["val_loss"]
        tokens = args.base_steps * ROWS * LENGTH / 1e6
        about = (
            f"A LLaMA of 4 layers x 192, pretrained on {tokens:.1f}M tokens ({loss:.2f} nats a held-out token), adapted"
        )
    found = compare(ablation, args.settings, args.rates, args.seeds)
    about += (
        f" for {args.steps * ROWS * LENGTH / 1e3:.0f}k tokens; the best of the learning rates "
        f"{', '.join(f'{rate:g}' for rate in args.rates)} by masked CE at t = 0.5; mean and half range of "
        f"{len(args.seeds)} seeds on {args.rows} held-out rows of {LENGTH} tokens."
    )
    line = [Path(word).name if Path(word).is_absolute() else word for word in (sys.argv[1:] if argv is None else argv)]
    print(write_report(found, about, shlex.join(["python", "benchmarks/ablation.py", *line]), args.write))
    return 0


if __name__ == "__main__":
    sys.exit(main())
