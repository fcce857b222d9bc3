"""What adaptation gains and costs, measured: the base, the base read bidirectionally, the demo's model, a longer run.

    CORPORA=texts make experiments DATA_DIR=eval          # as below, in the project's environment
    python benchmarks/experiments.py --corpora texts --data_dir eval --minutes 240

Trains SmolLM2-135M on English of several kinds (experiments/smollm2_mixture.yaml) for --minutes, exports it, evaluates
all four on the first examples of each task with python -m tools.evaluate, and compares them. Each step continues where
it was stopped; what is there already is not made again. In --corpora: books, prose_classics, web_usgov, world_factbook,
tinystories and python, each NAME.jsonl.gz with `text`. In --data_dir: the files of the tasks, as for tools.evaluate.
Into experiments/ go the run's resolved configuration and metrics and the table; weights stay in runs/.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.evaluation.results import shown

HERE = Path(__file__).resolve().parent / "experiments"
BASE = "runs/base/SmolLM2-135M-Instruct"
RUN = Path("runs/mixture")
OUT = Path("runs/experiments")
# examples of each task, so that two cores come to an end
LIMITS = {
    "rocstories": 100, "humaneval_single_line": 50, "lambada": 100, "hellaswag": 40, "piqa": 50, "winogrande": 50,
    "social_i_qa": 40, "triviaqa": 25,
}  # fmt: skip
DRAWS = 4
TITLES = {
    "rocstories": "ROCStories, third sentence", "humaneval_single_line": "HumanEval, one line", "lambada": "LAMBADA",
    "hellaswag": "HellaSwag", "piqa": "PIQA", "winogrande": "WinoGrande", "social_i_qa": "SIQA", "triviaqa": "TriviaQA",
}  # fmt: skip


def run(*command: str, **environment: str) -> None:
    """A step, its output shown."""
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, env={**os.environ, **environment})


def train(corpora: str, minutes: float) -> Path:
    """Train for so many minutes more, and export; the folder of the export."""
    python = sys.executable
    prepare = [python, "-m", "data_prep", "prepare", str(HERE / "smollm2_mixture_corpus.yaml"), "num_workers=2"]
    run(*prepare, CORPORA=corpora)
    command = [python, "-m", "torch.distributed.run", "--nproc_per_node", "1", "pretrain/main.py"]
    command += ["--config", str(HERE / "smollm2_mixture.yaml"), "--deepspeed_config", "ds_configs/zero0.json"]
    done = subprocess.run([*command, f"train.max_minutes={minutes:g}", "wandb.mode=disabled"])
    if done.returncode not in (0, 75):  # 75: the time is up
        raise SystemExit(f"training ended with {done.returncode}")
    steps = sorted((RUN / "checkpoints").glob("step_*"))
    export = OUT / f"mixture_{int(steps[-1].name.removeprefix('step_'))}_steps"
    if not export.exists():
        run(python, "-m", "tools.export", str(RUN), str(export))
    return export


def evaluate(model: str, data_dir: str, output: Path) -> None:
    """All tasks, each with its own number of examples."""
    for task, limit in LIMITS.items():
        run(
            sys.executable, "-m", "tools.evaluate", model, "--tasks", task, "--limit", str(limit),
            "--draws", str(DRAWS), "--data_dir", data_dir, "--output", str(output),
        )  # fmt: skip


def table(models: dict[str, Path]) -> list[str]:
    """Markdown: a line a task, a column a model."""
    reports = {name: json.loads((folder / "results.json").read_text())["tasks"] for name, folder in models.items()}
    lines = [f"| | {' | '.join(models)} | n |", "| --- " * (len(models) + 2) + "|"]
    for task in LIMITS:
        metrics = ["rouge1", "rougeL"] if task == "rocstories" else ["accuracy"]
        for metric in metrics:
            cells = []
            for name in models:
                scores = reports[name][task]
                error = scores["stderr"] if metric == scores["metric"] else scores[f"{metric}_stderr"]
                cells.append(shown(scores[metric], float("nan") if error is None else error, metric))
            kind = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L"}.get(
                metric, "pass@1 %" if "human" in task else "accuracy %"
            )
            lines.append(f"| {TITLES[task]}: {kind} | {' | '.join(cells)} | {reports[name][task]['n']} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", help="folder of the texts; not needed with --export")
    parser.add_argument("--data_dir", required=True, help="folder of the tasks' examples")
    parser.add_argument("--minutes", type=float, default=240, help="of training; default: %(default)g")
    parser.add_argument("--export", type=Path, help="an export of the longer run, in place of training")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="the demo's run; default: %(default)s")
    args = parser.parse_args()
    if not args.export and not args.corpora:
        raise SystemExit("--corpora is missing: the folder of the texts to train on")
    OUT.mkdir(parents=True, exist_ok=True)
    export = args.export or train(args.corpora, args.minutes)
    demo = max(args.demo.glob("step_*/"), key=lambda p: int(p.name.removeprefix("step_")))
    models = {
        "AR base": BASE,
        "read bidirectionally": str(args.demo / "step_0"),
        f"demo, {demo.name.removeprefix('step_')} steps": str(demo),
        export.name.replace("_", " ").replace("mixture ", "longer run, "): str(export),
    }
    folders = {}
    for name, model in models.items():
        folders[name] = OUT / "evaluated" / Path(model).name
        evaluate(model, args.data_dir, folders[name])
    run(sys.executable, "-m", "tools.compare", *map(str, folders.values()), "--output", str(OUT / "comparison"))
    command = f"`python benchmarks/experiments.py {' '.join(sys.argv[1:])}`"
    lines = [command, "", *table(folders)]
    (HERE / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.copy(OUT / "comparison" / "compare.md", HERE / "compare.md")
    for name in ("config.yaml", "metrics.jsonl"):
        if (RUN / name).exists():
            shutil.copy(RUN / name, HERE / f"smollm2_mixture.run.{name.partition('.')[2]}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
