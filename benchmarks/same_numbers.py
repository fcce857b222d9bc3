"""Does a refactor change a number? Tiny runs under a commit and under the working tree, compared bit by bit.

    python benchmarks/same_numbers.py --before 16eb258 [--cache FOLDER] [--only PATTERN] [--after FOLDER]

Every line of metrics.jsonl must be the same but for the keys that depend on the machine, and so must every shard
that data_prep writes. It prints one line a run and exits with 1 where one differs. This process never imports the
project: each tree runs in processes of its own, through pretrain/main.py and `python -m data_prep`.

The cache holds the inputs (tokenizer, bases, corpora) and the numbers of each commit. A run whose settings here have
changed, or that another machine or other packages recorded, is recorded again; after a change to what
`make_inputs` makes, remove the folder.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {"tokens_per_second", "tokens_per_second_per_gpu", "step_seconds", "data_wait"}
MACHINE |= {"peak_memory_gib", "mfu", "time", "goodput"}  # keys that may differ
GROUPS = (2, 1, 2)  # processes of each group; the groups start one after the other
PATIENCE = 300  # seconds without a finished run before a group counts as hung
VOCABULARY = 384
COMMON = {
    "model.base": "llama",
    "model.dtype": "fp32",
    "data.path": "mixed",
    "annealing.steps": 4,
    "train.steps": 5,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "optimizer.lr": 1e-3,
    "optimizer.warmup_steps": 2,
    "checkpoint.every": 0,
    "checkpoint.keep": 0,
    "validation.every": 2,
    "validation.rows": 6,
    "validation.times": "[0.5]",
    "wandb.mode": "disabled",
    "guards.stall_minutes": 0,
}
ISOLATED = {"data.path": "sentences", "data.isolate_documents": "true"}
SPIKES = {"guards.spike_factor": 0.01, "guards.spike_steps": 1, "guards.on_spike": "rollback", "checkpoint.keep": 4}
EXTRAS = {  # at ZeRO stage 1 on 2 ranks
    "stratified": {"diffusion.times": "stratified"},
    "complementary": {"diffusion.times": "complementary"},
    "maskable": {"diffusion.normalize_by": "maskable"},
    **{f"isolated_{form}": {**ISOLATED, "annealing.form": form} for form in ("bernoulli", "window", "block", "none")},
    "padded": {"data.path": "padded"},
    "padded_isolated": {"data.path": "padded", "data.isolate_documents": "true", "annealing.form": "window"},
    "cosine_block": {"annealing.form": "block", "annealing.schedule": "cosine"},
    "stepwise_block": {"annealing.form": "block", "annealing.schedule": "stepwise", "annealing.stages": 2},
    "gpt2": {"model.base": "gpt2"},
    "bf16": {"model.dtype": "bf16"},
    "wsd": {"optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.4, "train.tokens": 1000},
    "checkpointing": {"model.activation_checkpointing": "full", "model.loss": "plain"},
    "weights": {"data.weights": "{short: 1, long: 1}", "train.seed": 7},
    "rollback": {**SPIKES, "checkpoint.every": 4, "train.steps": 24, "validation.every": 8},
    "nonfinite": {"optimizer.lr": 1e30, "guards.max_skipped_in_a_row": 2},
}

# One rank of a group. It takes a file of [name, arguments] pairs and appends each exit code to OUT/NAME.codes.
DRIVER = """
import importlib, json, os, sys, traceback
from pathlib import Path
import torch
import torch.distributed as dist
jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
dist.destroy_process_group, end = (lambda *args, **names: None), dist.destroy_process_group  # one for all the runs
entry = importlib.import_module("pretrain.main")
if Path(entry.__file__).resolve().parents[1] != Path.cwd().resolve():
    sys.exit(f"{entry.__file__} is not in {Path.cwd()}")
for name, arguments in jobs:
    torch.manual_seed(0)  # no run depends on those before it
    try:
        code = entry.main(arguments)
    except (Exception, SystemExit):
        code = traceback.format_exc()
    if os.environ["RANK"] == "0" or isinstance(code, str):
        with open(out / f"{name}.codes", "a") as file:
            file.write(json.dumps(code) + chr(10))
if dist.is_initialized():
    end()
"""


@dataclass
class Run:
    """One configuration; `launches` says how often each of GROUPS launches it."""

    name: str
    stage: int
    settings: dict
    launches: tuple[int, int, int]

    def arguments(self, inputs: Path, out: Path) -> list[str]:
        """The arguments of pretrain/main.py."""
        places = {"model.base": inputs / "base", "data.path": inputs / "corpora"}
        pairs = [f"{key}={places[key] / value if key in places else value}" for key, value in self.settings.items()]
        config = ["--config", str(inputs / "empty.yaml"), "--deepspeed_config", f"ds_configs/zero{self.stage}.json"]
        return [*config, f"run_dir={out / self.name}", *pairs]

    def key(self) -> str:
        """A text that changes where the run computes something else."""
        return json.dumps([self.stage, self.settings, self.launches, GROUPS])


def all_runs() -> list[Run]:
    """Every annealing form at every ZeRO stage on 1 and 2 ranks, the extras, and two runs that resume."""
    runs = []
    for form in ("none", "bernoulli", "window", "block"):
        for stage in (0, 1, 2, 3):
            for ranks, launches in ((1, (0, 1, 0)), (2, (1, 0, 0))):
                name = f"{form}_zero{stage}_ranks{ranks}"
                runs.append(Run(name, stage, {**COMMON, "annealing.form": form}, launches))
    runs += [Run(name, 1, {**COMMON, **settings}, (1, 0, 0)) for name, settings in EXTRAS.items()]
    resumed = {**COMMON, "train.exit_interval": 2, "checkpoint.keep": 1}
    return [*runs, Run("resume", 1, resumed, (2, 0, 1)), Run("resume_other_ranks", 3, resumed, (1, 1, 1))]


def environment(tree: Path) -> dict[str, str]:
    """The environment of a process that runs `tree` on one CPU thread."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    fixed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    return {**kept, **fixed, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}


def about_machine() -> dict[str, str]:
    """What the bits of a run depend on beside its tree."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    packages = ("torch", "deepspeed", "transformers", "numpy")
    return {"cpu": cpu[1] if cpu else platform.processor(), **{name: version(name) for name in packages}}


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """A git worktree of `commit`, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="same_numbers_tree_") as name:
        tree = Path(name) / "tree"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)


def make_inputs(tree: Path, folder: Path) -> None:
    """Fill `folder` with a tokenizer, two bases of random weights, and corpora that `tree` prepares."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "text").mkdir(parents=True)
    (folder / "empty.yaml").write_text("{}\n")
    lines = (tree / "data_prep" / "demo" / "tales.jsonl").read_text(encoding="utf-8").splitlines()
    tales = [json.loads(line)["text"] for line in lines]
    make_models(tales, folder / "base")

    def source(name: str, texts: list[str], **settings) -> dict:
        path = folder / "text" / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return {"name": name, "paths": [str(path)], **settings}

    sentences = [s for tale in tales[:60] for s in re.split(r"(?<=[.!?])\s+", tale) if 4 < len(s) < 50]
    paragraphs = [p for tale in tales[100:130] for p in tale.split("\n") if len(p) > 4]
    mixed = [source("short", [t[:1500] for t in tales[:60]], weight=3.0)]
    mixed.append(source("long", [t[:1500] for t in tales[300:320]], weight=1.0))
    corpora = {
        "mixed": {"sources": mixed, "seq_len": 32},
        "sentences": {"sources": [source("s", sentences)], "seq_len": 64, "deduplicate": "exact", "unit_mb": 0.01},
        "padded": {"sources": [source("p", paragraphs)], "seq_len": 64, "packing": "best_fit", "add_bos": True},
    }
    for name, settings in corpora.items():
        text = json.dumps({"tokenizer": "?", "output_dir": "?", "validation_fraction": 0.15, **settings})
        (folder / "text" / f"{name}.yaml").write_text(text)  # JSON is YAML
    for name in ("demo", *corpora):
        prepare(tree, folder, name, folder / "corpora" / name)
    (folder / "whole").touch()


def make_models(tales: list[str], folder: Path) -> None:
    """Save tiny causal models of two families in `folder`, each with a byte-level BPE trained on `tales`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>", "<bos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(tales[:100], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")
    special = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 0, "tie_word_embeddings": False}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    llama = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, **heads, **special)
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **{**special, "tie_word_embeddings": True})
    for name, config in (("llama", llama), ("gpt2", gpt2)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # far from the initial near-uniform output, so that differences show
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def prepare(tree: Path, inputs: Path, name: str, output: Path) -> dict:
    """Let `tree` prepare the corpus `name` into `output`; returns its record. `demo` has the tree's own settings."""
    config = "data_prep/configs/demo.yaml" if name == "demo" else str(inputs / "text" / f"{name}.yaml")
    command = [sys.executable, "-m", "data_prep", "prepare", config, f"output_dir={output}"]
    command += [f"tokenizer={inputs / 'base' / 'llama'}", "num_workers=2"]
    outcome = subprocess.run(command, cwd=tree, env=environment(tree), text=True, capture_output=True, check=False)
    return shard_record(output, outcome.returncode and outcome.stderr)


def shard_record(folder: Path, code: int | str = 0) -> dict:
    """A record as of a run, with a line for every shard."""
    files = sorted(folder.rglob("*.arrow"))
    shards = [(str(f.relative_to(folder)), hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]
    return {"codes": [code], "lines": [{"step": name, "sha256": digest} for name, digest in shards]}


def run_group(tree: Path, ranks: int, jobs: list[tuple[str, list[str]]], out: Path) -> None:
    """Launch `jobs` one after the other in one process a rank. A job that did not end leaves no code in `out`."""
    (out / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as probe, ExitStack() as stack:
        probe.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        probe.close()
        started, log = [], out / "log"
        for rank in range(ranks):
            place = {**environment(tree), **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            file = stack.enter_context(open(f"{log}.{rank}", "wb"))
            command = [sys.executable, "-c", DRIVER, str(out / "jobs.json"), str(out)]
            started.append(subprocess.Popen(command, cwd=tree, env=place, stdout=file, stderr=subprocess.STDOUT))
        try:
            seen, since = -1, time.monotonic()
            while any(process.poll() is None for process in started) and time.monotonic() - since < PATIENCE:
                size = sum(file.stat().st_size for file in out.glob("*.codes"))
                if size != seen and not any(process.returncode for process in started):
                    seen, since = size, time.monotonic()
                time.sleep(0.1)
        finally:
            for process in started:
                process.kill()
                process.wait()
    for rank, process in enumerate(started):
        if process.returncode:
            tail = Path(f"{log}.{rank}").read_text(errors="replace")[-2000:]
            print(f"rank {rank} of {ranks} under {tree} ended with {process.returncode}:\n{tail}", flush=True)


def train(tree: Path, inputs: Path, runs: list[Run]) -> dict[str, dict]:
    """The record of each run under `tree`: exit codes, and the lines of metrics.jsonl without MACHINE."""
    records = {}
    with tempfile.TemporaryDirectory(prefix="same_numbers_runs_") as name:
        out = Path(name)
        for number, ranks in enumerate(GROUPS):
            jobs = [(run.name, run.arguments(inputs, out)) for run in runs for _ in range(run.launches[number])]
            if jobs:
                run_group(tree, ranks, jobs, out)
        for run in runs:
            found, metrics = out / f"{run.name}.codes", out / run.name / "metrics.jsonl"
            codes = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
            lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
            kept = [{key: value for key, value in line.items() if key not in MACHINE} for line in lines]
            records[run.name] = {"codes": codes, "lines": kept}
    return records


def difference(before: dict, after: dict) -> str | None:
    """The first difference of two records, in words; None where they are the same to the bit."""
    for a, b in zip_longest(before["lines"], after["lines"], fillvalue={}):
        for key in dict.fromkeys([*a, *b]):
            x, y = (json.dumps(line[key]) if key in line else "nothing" for line in (a, b))
            if x != y:  # as texts: -0.0 is not 0.0, 1 is not true
                return f"step {a.get('step', b.get('step'))}, {key}: {x} before, {y} after{error_of(after)}"
    if before["codes"] == after["codes"]:
        return None
    return f"exit codes {before['codes']} before, {[c for c in after['codes'] if c == 0 or c]} after{error_of(after)}"


def error_of(record: dict) -> str:
    """What a record says of an exception, or of launches that did not end."""
    errors = [code.strip().splitlines()[-1] for code in record["codes"] if isinstance(code, str) and code.strip()]
    return f" ({errors[0]})" if errors else "" if record["codes"] else " (it did not end)"


def record_before(commit: str, folder: Path, runs: list[Run]) -> dict[str, dict]:
    """The records of `runs` at `commit`, from `folder` where they are there. Exits where one cannot be recorded."""
    path, inputs, about, began = folder / "before.json", folder / "inputs", about_machine(), time.monotonic()
    known = json.loads(path.read_text()) if path.exists() else {}
    records = known.get("records", {}) if known.get("about") == about else {}
    missing = [run for run in runs if records.get(run.name, {}).get("key") != run.key()]
    if missing or not (inputs / "whole").exists():
        with tree_of(commit) as tree:
            if not (inputs / "whole").exists():
                make_inputs(tree, inputs)
            for name, record in train(tree, inputs, missing).items():
                if not record["lines"] or not record["codes"] or error_of(record):
                    sys.exit(f"{commit} itself cannot run {name}: {record['codes']}")
                records[name] = record | {"key": next(run.key() for run in runs if run.name == name)}
        path.write_text(json.dumps({"about": about, "records": records}))
        print(f"{len(missing)} runs at {commit[:7]} recorded in {time.monotonic() - began:.0f} s", flush=True)
    return records


def main() -> int:
    """Compare; the exit code is 1 where a number differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="a commit of this repository")
    parser.add_argument("--after", type=Path, default=ROOT, help="a tree of the project; default: this one")
    parser.add_argument("--cache", type=Path, help="keeps the numbers of --before for later calls")
    parser.add_argument("--only", default="*", help="runs whose name has this in it; * stands for anything")
    args = parser.parse_args()
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{args.before}^{{commit}}"]
    commit = subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()
    runs = [run for run in all_runs() if fnmatch(run.name, f"*{args.only}*")]
    with tempfile.TemporaryDirectory(prefix="same_numbers_") as name:
        folder = (args.cache.resolve() if args.cache else Path(name)) / commit
        folder.mkdir(parents=True, exist_ok=True)
        before, began, tree = record_before(commit, folder, runs), time.monotonic(), args.after.resolve()
        found: dict[str, str | None] = {}
        for corpus in sorted(path.name for path in (folder / "inputs" / "corpora").iterdir()):
            if fnmatch(f"corpus_{corpus}", f"*{args.only}*"):
                made = prepare(tree, folder / "inputs", corpus, Path(name) / "made" / corpus)
                found[f"corpus_{corpus}"] = difference(shard_record(folder / "inputs" / "corpora" / corpus), made)
                print(f"corpus_{corpus}: {found[f'corpus_{corpus}'] or 'same'}", flush=True)
        after = train(tree, folder / "inputs", runs)
    for run in runs:
        found[run.name] = difference(before[run.name], after[run.name])
        print(f"{run.name}: {found[run.name] or 'same'}")
    differing = sum(text is not None for text in found.values())
    print(f"{len(found) - differing} of {len(found)} are the same as at {commit[:7]}; {time.monotonic() - began:.0f} s")
    return 1 if differing or not found else 0


if __name__ == "__main__":
    sys.exit(main())
