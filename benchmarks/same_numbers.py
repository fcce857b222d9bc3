"""Does a refactor change a number? Tiny runs under a commit and under the working tree, compared bit by bit.

    python benchmarks/same_numbers.py --before 16eb258 [--cache FOLDER] [--only PATTERN] [--after FOLDER]

Every line of metrics.jsonl must be the same but for the keys that depend on the machine, and so must every shard
that data_prep writes. It prints one line a run and exits with 1 where one differs. This process never imports the
project: each tree runs in processes of its own, through pretrain/main.py and `python -m data_prep`. The cache holds
the inputs and, by commit, the numbers; remove it after a change to what `make_inputs` makes.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MACHINE = ("tokens_per_second", "tokens_per_second_per_gpu", "step_seconds", "data_wait")
MACHINE += ("peak_memory_gib", "mfu", "time", "goodput")  # these keys may differ
CORPORA = ("demo", "mixed", "sentences", "padded")
GROUPS = (2, 1, 2)  # processes of each group; the groups start one after the other
COMMON = (
    "model.base={base}/llama model.dtype=fp32 data.path={corpora}/mixed annealing.steps=4 train.steps=5 "
    "train.global_batch_size=8 train.micro_batch_size=2 optimizer.lr=1e-3 optimizer.warmup_steps=2 "
    "checkpoint.every=0 checkpoint.keep=0 validation.every=2 validation.rows=6 validation.times=[0.5] "
    "wandb.mode=disabled guards.stall_minutes=0 "
)
ISOLATED = "data.path={corpora}/sentences data.isolate_documents=true annealing.form="
SPIKES = "guards.spike_factor=0.01 guards.spike_steps=1 guards.on_spike=rollback checkpoint.every=4 checkpoint.keep=4 "
EXTRAS = {  # at ZeRO stage 1 on 2 ranks
    **{times: f"diffusion.times={times}" for times in ("stratified", "complementary")},
    "maskable": "diffusion.normalize_by=maskable",
    **{f"isolated_{form}": ISOLATED + form for form in ("bernoulli", "window", "block", "none")},
    "padded": "data.path={corpora}/padded",
    "padded_isolated": "data.path={corpora}/padded data.isolate_documents=true annealing.form=window",
    "cosine_block": "annealing.form=block annealing.schedule=cosine annealing.steps=5",
    "stepwise_block": "annealing.form=block annealing.schedule=stepwise annealing.stages=2",
    "gpt2": "model.base={base}/gpt2",
    "bf16": "model.dtype=bf16",
    "wsd": "optimizer.schedule=wsd optimizer.decay_fraction=0.4 train.tokens=1000",
    "checkpointing": "model.activation_checkpointing=full model.loss=plain",
    "weights": "data.weights.short=1 data.weights.long=1 train.seed=7",
    "rollback": SPIKES + "train.steps=24 validation.every=8 optimizer.lr=1e-2",
    "nonfinite": "optimizer.lr=1e30 guards.max_skipped_in_a_row=2",
}

# One rank of a group. It takes a file of [name, arguments] pairs and appends each exit code to OUT/NAME.codes.
DRIVER = """
import faulthandler, importlib, json, os, sys, traceback
from pathlib import Path
import deepspeed, torch, torch.distributed as dist
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled in a cache for all; training does not call it
jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
dist.destroy_process_group, end = (lambda *args, **names: None), dist.destroy_process_group  # one for all the runs
entry = importlib.import_module("pretrain.main")
if Path(entry.__file__).resolve().parents[1] != Path.cwd().resolve():
    sys.exit(f"{entry.__file__} is not in {Path.cwd()}")
for name, arguments in jobs:
    faulthandler.dump_traceback_later(180, exit=True)  # a run that hangs ends the group
    torch.manual_seed(0)  # no run depends on those before it
    try:
        code = entry.main(arguments)
    except (Exception, SystemExit):
        code = " | ".join(line.strip() for line in traceback.format_exc().splitlines()[-3:])
    if os.environ["RANK"] == "0" or isinstance(code, str):
        with open(out / f"{name}.codes", "a") as file:
            file.write(json.dumps(code) + chr(10))
if dist.is_initialized():
    end()
"""


@dataclass
class Run:
    """One configuration; `launches` says how often each of GROUPS launches it. The last of equal settings counts."""

    name: str
    stage: int
    settings: str
    launches: tuple[int, int, int] = (1, 0, 0)

    def arguments(self, inputs: Path, out: Path) -> list[str]:
        """The arguments of pretrain/main.py."""
        config = ["--config", str(inputs / "empty.yaml"), "--deepspeed_config", f"ds_configs/zero{self.stage}.json"]
        settings = [s.format(base=inputs / "base", corpora=inputs / "corpora") for s in self.settings.split()]
        return [*config, f"run_dir={out / self.name}", *settings]

    def key(self) -> str:
        """What the bits of the run depend on beside its tree."""
        return f"{self.stage} {self.launches} {GROUPS} {self.settings} on {machine()}"


def all_runs() -> list[Run]:
    """Every annealing form at every ZeRO stage on 1 and 2 ranks, the extras, and two runs that resume."""
    runs = [
        Run(f"{form}_zero{stage}_ranks{ranks}", stage, f"{COMMON}annealing.form={form}", launches)
        for form in ("none", "bernoulli", "window", "block")
        for stage in (0, 1, 2, 3)
        for ranks, launches in ((1, (0, 1, 0)), (2, (1, 0, 0)))
    ]
    runs += [Run(name, 1, COMMON + settings) for name, settings in EXTRAS.items()]
    resumed = f"{COMMON}train.exit_interval=2 checkpoint.keep=1"
    return [*runs, Run("resume", 1, resumed, (2, 0, 1)), Run("resume_other_ranks", 3, resumed, (1, 1, 1))]


def environment(tree: Path) -> dict[str, str]:
    """The environment of a process that runs `tree` on one CPU thread."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    fixed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    return {**kept, **fixed, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}


@cache
def machine() -> str:
    """The processor and the packages that compute."""
    cpu = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return ", ".join([*cpu[:1], *(f"{p} {version(p)}" for p in ("torch", "deepspeed", "transformers", "numpy"))])


def make_inputs(tree: Path, folder: Path) -> dict[str, dict]:
    """Fill `folder` with two bases and with corpora that `tree` prepares; returns the record of each corpus."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "text").mkdir(parents=True)
    (folder / "empty.yaml").write_text("{}\n")
    lines = (tree / "data_prep" / "demo" / "tales.jsonl").read_text(encoding="utf-8").splitlines()
    tales = [json.loads(line)["text"] for line in lines]
    make_models(tales, folder / "base")
    texts = {
        "short": [tale[:1500] for tale in tales[:60]],
        "long": [tale[:1500] for tale in tales[300:320]],
        "sentences": [s for tale in tales for s in re.split(r"(?<=[.!?])\s+", tale) if 4 < len(s) < 40][:600],
        "beginnings": [tale[: 40 + len(tale) % 80] for tale in tales[60:300]],
    }
    sources = {name: {"name": name, "paths": [str(folder / "text" / f"{name}.jsonl")]} for name in texts}
    for name, documents in texts.items():
        content = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        Path(sources[name]["paths"][0]).write_text(content, encoding="utf-8")
    corpora = {
        "mixed": {"sources": [{**sources["short"], "weight": 3}, sources["long"]], "seq_len": 32},
        "sentences": {"sources": [sources["sentences"]], "seq_len": 64, "deduplicate": "exact", "unit_mb": 0.01},
        "padded": {"sources": [sources["beginnings"]], "seq_len": 64, "packing": "best_fit", "add_bos": True},
    }
    for name, settings in corpora.items():  # JSON is YAML
        (folder / "text" / f"{name}.yaml").write_text(json.dumps({"validation_fraction": 0.15, **settings}))
    return {f"corpus_{name}": prepare(tree, folder, name, folder / "corpora" / name) for name in CORPORA}


def make_models(tales: list[str], folder: Path) -> None:
    """Save tiny causal models of two families in `folder`, each with a byte-level BPE trained on `tales`."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(tales[:100], 384, special_tokens=["<eos>", "<bos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", bos_token="<bos>")
    special = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": 0, "tie_word_embeddings": False}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    llama = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, **heads, **special)
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **{**special, "tie_word_embeddings": True})
    for name, config in (("llama", llama), ("gpt2", gpt2)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # far from the initial near-uniform output, so that differences show
            parameter.data *= 4 if parameter.ndim > 1 else 1
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def prepare(tree: Path, inputs: Path, name: str, output: Path) -> dict:
    """Let `tree` prepare the corpus `name` into `output`; returns its record. `demo` has the tree's own settings."""
    config = "data_prep/configs/demo.yaml" if name == "demo" else str(inputs / "text" / f"{name}.yaml")
    command = [sys.executable, "-m", "data_prep", "prepare", config, f"output_dir={output}"]
    command += [f"tokenizer={inputs / 'base' / 'llama'}", "num_workers=2"]
    outcome = subprocess.run(command, cwd=tree, env=environment(tree), text=True, capture_output=True, check=False)
    digests = {str(f.relative_to(output)): hashlib.sha256(f.read_bytes()) for f in sorted(output.rglob("*.arrow"))}
    lines = [{"step": name, "sha256": digest.hexdigest()} for name, digest in digests.items()]
    return {"codes": [outcome.returncode and outcome.stderr[-300:]], "lines": lines}


def run_group(tree: Path, ranks: int, jobs: list[tuple[str, list[str]]], out: Path) -> None:
    """Launch `jobs` one after the other in one process a rank. A job that does not end leaves no code in `out`."""
    (out / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    place |= {**environment(tree), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    command, started = [sys.executable, "-c", DRIVER, str(out / "jobs.json"), str(out)], []
    try:
        for rank in range(ranks):
            mine = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(out / f"log.{rank}", "wb") as log:
                started.append(subprocess.Popen(command, cwd=tree, env=mine, stdout=log, stderr=subprocess.STDOUT))
        for rank, process in enumerate(started):
            if process.wait():
                tail = (out / f"log.{rank}").read_text(errors="replace")[-2000:]
                print(f"rank {rank} of {ranks} in {tree} ended with {process.returncode}:\n{tail}", flush=True)
    finally:
        for process in started:
            process.kill()


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
            files = (out / f"{run.name}.codes", out / run.name / "metrics.jsonl")
            texts = [file.read_text() if file.exists() else "" for file in files]
            codes, lines = ([json.loads(line) for line in text.splitlines()] for text in texts)
            kept = [{key: value for key, value in line.items() if key not in MACHINE} for line in lines]
            records[run.name] = {"codes": codes, "lines": kept}
    return records


def difference(before: dict, after: dict) -> str:
    """The first difference of two records, in words; empty where they are the same to the bit."""
    same_codes = before["codes"] == after["codes"]
    codes = "" if same_codes else f"; exit codes {before['codes']} before, {after['codes']} after"
    for a, b in zip_longest(before["lines"], after["lines"], fillvalue={}):
        for key in dict.fromkeys([*a, *b]):
            x, y = (json.dumps(line[key]) if key in line else "nothing" for line in (a, b))
            if x != y:  # as texts: -0.0 is not 0.0, 1 is not true
                return f"step {a.get('step', b.get('step'))}, {key}: {x} before, {y} after{codes}"
    return codes.removeprefix("; ")


def record_before(commit: str, folder: Path, runs: list[Run]) -> dict[str, dict]:
    """The records of `runs` at `commit`, from `folder` where they are there. Exits where one cannot be recorded."""
    path, inputs, began = folder / "before.json", folder / "inputs", time.monotonic()
    records = json.loads(path.read_text()) if path.exists() else {}
    missing = [run for run in runs if records.get(run.name, {}).get("key") != run.key()]
    if not missing and "corpus_demo" in records:
        return records
    with tempfile.TemporaryDirectory(prefix="same_numbers_tree_") as name:
        git, tree = ["git", "-C", str(ROOT), "worktree"], Path(name) / "tree"
        subprocess.run([*git, "add", "-q", "--detach", str(tree), commit], check=True)
        try:
            made = {} if "corpus_demo" in records else make_inputs(tree, inputs)
            made |= train(tree, inputs, missing)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    launches = {run.name: sum(run.launches) for run in missing}
    for name, record in made.items():
        expected = [2] if name == "nonfinite" else [0] * launches.get(name, 1)
        if not record["lines"] or record["codes"] != expected:
            sys.exit(f"{commit} itself cannot make {name}: exit codes {record['codes']}")
    records |= made | {run.name: {**made[run.name], "key": run.key()} for run in missing}
    path.write_text(json.dumps(records))
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
        corpora = [corpus for corpus in CORPORA if fnmatch(f"corpus_{corpus}", f"*{args.only}*")]
        after = {f"corpus_{c}": prepare(tree, folder / "inputs", c, Path(name) / c) for c in corpora}
        after |= train(tree, folder / "inputs", runs)
    found = {name: difference(before[name], record) for name, record in after.items()}
    for name, text in found.items():
        print(f"{name}: {text or 'same'}")
    same = sum(not text for text in found.values())
    print(f"{same} of {len(found)} are the same as at {commit[:7]}; {time.monotonic() - began:.0f} s")
    return 0 if found and same == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
