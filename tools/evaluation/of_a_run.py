"""What tools.evaluate_run needs beside its loop: calls of tools.evaluate, the table, scores for metrics.jsonl."""

import ctypes
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.errors import UserError
from pretrain.runtime.evaluation import as_metrics, environment, lock_metrics, read_scores
from pretrain.runtime.metrics import amend, start_wandb

from ..run_folder import RunFolder
from .results import is_fraction, shown

EVALUATE = (sys.executable, "-m", "tools.evaluate")
END_SECONDS = 5.0  # that tools.evaluate gets to end
PR_SET_PDEATHSIG = 1  # of Linux's prctl
LIBC = ctypes.CDLL(None)


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel send this process signal `number` when its parent ends, however that ends."""
    if hasattr(LIBC, "prctl"):
        LIBC.prctl(PR_SET_PDEATHSIG, number)


def check_tasks(run: RunFolder) -> None:
    """Raise UserError where tools.evaluate will refuse the run's settings, such as an unknown task."""
    code, reason = _evaluate(run, run.path / "model", run.path / "evaluation" / "dry_run", "--dry_run")
    if code:
        raise UserError(f"the run's evaluation settings do not work: {reason}")


def evaluate_export(run: RunFolder, export: Path, output: Path) -> tuple[int, str]:
    """Evaluate an export as the run asks; (exit code, the error that was reported)."""
    return _evaluate(run, export, output)


def _evaluate(run: RunFolder, checkpoint: Path, output: Path, *more: str) -> tuple[int, str]:
    """tools.evaluate in a process of its own, which gives its memory back and ends with this one."""
    asked = run.config.evaluation
    command = [*EVALUATE, str(checkpoint), "--output", str(output), "--tasks", asked.tasks, *more]
    for name in ("data_dir", "limit", "likelihood", "draws"):
        if getattr(asked, name):
            command += [f"--{name}", str(getattr(asked, name))]
    root = str(Path(__file__).resolve().parents[2])
    errors = run.path / "evaluation" / "errors.txt"
    with open(errors, "w", encoding="utf-8") as stderr:
        env = environment(root, asked.device)
        process = subprocess.Popen(command, env=env, stderr=stderr, preexec_fn=end_with_parent)
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
    printed = errors.read_text(encoding="utf-8", errors="replace")
    print(printed, end="", file=sys.stderr, flush=True)
    lines = [line for line in printed.splitlines() if line.strip()]
    found = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
    return code, found[-1] if code and found else ""


def table(scores: dict[int, dict[str, Any]], asked: dict[str, Any]) -> str:
    """Markdown of the steps that were asked this: one line a step, one column a task."""
    rows = {step: found for step, found in sorted(scores.items()) if found["asked"] == asked}
    titles: dict[str, str] = {}
    for found in rows.values():
        for task, r in found["tasks"].items():
            titles[task] = f"{task} ({r['metric']}{', %' if is_fraction(r['metric']) else ''})"
    first = f"first {asked['limit']:,}" if asked["limit"] else "all"
    lines = [
        f"While training, on {first} examples of each task, ± standard error.", "",
        f"| step | tokens | {' | '.join(titles.values())} |", f"| ---: | ---: {'| ---: ' * len(titles)}|",
    ]  # fmt: skip
    for step, found in rows.items():
        lines.append(f"| {step:,} | {found['tokens']:,} | {' | '.join(_cell(found['tasks'].get(t)) for t in titles)} |")
    return "\n".join(lines) + "\n"


def _cell(result: dict[str, Any] | None) -> str:
    if result is None or result["score"] is None:
        return "–"
    error = result["stderr"]
    return shown(result["score"], float("nan") if error is None else error, result["metric"])


def hand_over(run: RunFolder) -> None:
    """Add the scores of a finished run to its metrics.jsonl and wandb, unless a trainer is there to do it."""
    lock = lock_metrics(run.path)
    if lock is None:
        return
    with lock:
        new = amend(run.path, {step: as_metrics(found) for step, found in read_scores(run.path).items()})
    if new and run.config.wandb.mode != "disabled":
        run.config.run_dir = str(run.path)
        wandb = start_wandb(run.config)
        for step, values in sorted(new.items()):
            wandb.log({"step": step, **values})
        wandb.finish()
