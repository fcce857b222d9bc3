"""What is saved and how it is found again.

    RUN_DIR/config.yaml                        the resolved configuration
    RUN_DIR/model/                             config.json and tokenizer of the adapted model, no weights
    RUN_DIR/checkpoints/step_00000100/         DeepSpeed's files and checkpoint.json
    RUN_DIR/checkpoints/latest                 the name of the newest whole one

A checkpoint is written under a temporary name, hashed, forced to disk and renamed: a folder named step_* is
whole. A run resumes from the newest one whose files are what checkpoint.json says.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from common.config import load_config, save_config
from common.errors import UserError
from common.files import write_atomically

from .config import RunConfig

# May change when a run resumes; everything else decides what is computed.
FREE = (
    "run_dir",
    "model.attention",
    "model.loss",
    "model.activation_checkpointing",
    "model.compile",
    "model.liger",
    "data.path",
    "data.verify",
    "train.micro_batch_size",
    "train.exit_interval",
    "train.max_minutes",
    "checkpoint",
    "validation",
    "guards",
    "wandb",
)
PACKAGES = ("torch", "deepspeed", "transformers")
ADAM_BYTES = 12  # a parameter: fp32 copy and two moments
SPARE = 1.1  # times the newest checkpoint's size that must be free before another is written


def check_same_run(config: RunConfig) -> None:
    """Raise UserError when RUN_DIR holds a run whose configuration would compute something else."""
    path = Path(config.run_dir) / "config.yaml"
    if not path.exists() or config.checkpoint.allow_changes:
        return
    before, now = (_flat(asdict(c)) for c in (load_config(RunConfig, path), config))
    for key in sorted(before.keys() | now.keys()):
        free = any(key == name or key.startswith(name + ".") for name in FREE)
        if key in ("train.steps", "train.tokens") and now["optimizer.schedule"] == "constant":
            free = True  # a longer run at a constant rate is the same run
        if not free and before.get(key) != now.get(key):
            raise UserError(
                f"{config.run_dir} holds a run with {key}={before.get(key)}, but {now.get(key)} was asked for; "
                "choose another run_dir, the same value to resume, or checkpoint.allow_changes=true"
            )


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _place() -> tuple[int, int]:
    """(rank, ranks); alone where there is no process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _gathered(mine: dict) -> dict:
    """The union of all ranks' dictionaries."""
    if _place()[1] == 1:
        return mine
    parts = [None] * _place()[1]
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def problem_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where its files are what checkpoint.json says. All ranks share the work."""
    try:
        files = json.loads((folder / "checkpoint.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{folder / 'checkpoint.json'} cannot be read ({type(error).__name__})"
    rank, ranks = _place()
    problems = {}
    for name, expected in sorted(files.items())[rank::ranks]:
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != expected["bytes"]:
            found = "missing" if size is None else f"{size} bytes"
            problems[name] = f"{path}: {found}, expected {expected['bytes']} bytes"
        elif _sha256(path) != expected["sha256"]:
            problems[name] = f"{path}: its content changed (sha256)"
    problems = _gathered(problems)
    return min(problems.values()) if problems else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find(
    run_dir: str | Path,
    step: int | None = None,
    at_most: int | None = None,
    world_size: int | None = None,
    say=print,
) -> tuple[Path, dict] | None:
    """The newest checkpoint that verifies, or that of `step`, with its checkpoint.json; None where there is none.

    `at_most` leaves out those of later steps, `world_size` those written by other numbers of ranks. `say` hears
    of each that is skipped, and why. Raises UserError when none of those there are verifies. All
    ranks call it together.
    """
    root = Path(run_dir) / "checkpoints"
    folders = sorted((f for f in root.glob("step_*") if f.name.count(".") == 0), reverse=True)
    if step is not None:
        folders = [f for f in folders if f.name == f"step_{step:08d}"]
    if at_most is not None:
        folders = [f for f in folders if f.name <= f"step_{at_most:08d}"]
    for folder in folders:
        problem = problem_of(folder)
        if problem is None:
            about = json.loads((folder / "checkpoint.json").read_text())
            if world_size in (None, about["world_size"]):
                return folder, about
            problem = f"{folder} was written by {about['world_size']} ranks"
        if step is None:
            say(f"{folder.name} is skipped: {problem}")
    if folders and world_size is None:
        raise UserError(f"no checkpoint in {root} can be used; the last looked at: {problem}")
    return None


def save(engine, config: RunConfig, step: int, state: dict) -> Path | None:
    """Save after `step` steps; all ranks call it together. `state` is kept in checkpoint.json.

    None where the disk has no room for another: the run goes on with the checkpoints that it has. Raises UserError
    where writing fails all the same; then this rank ends, and the others with it.
    """
    try:
        return _save(engine, config, step, state)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # how torch words a failed write
            raise
        rank, root = _place()[0], Path(config.run_dir) / "checkpoints"
        reason = str(error).splitlines()[0]
        problem = f"rank {rank} could not write step {step} to {root} ({reason}); the checkpoints from before are whole"
        if rank:  # main speaks for rank 0 alone
            print(f"error: {problem}", file=sys.stderr, flush=True)
        raise UserError(problem) from error


def _save(engine, config: RunConfig, step: int, state: dict) -> Path | None:
    root = Path(config.run_dir) / "checkpoints"
    folder = root / f"step_{step:08d}"
    temporary = folder.with_name(folder.name + ".tmp")
    rank, ranks = _place()
    if rank == 0:
        for old in root.glob("step_*.tmp"):  # of a process that was killed
            shutil.rmtree(old, ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
    states = ADAM_BYTES * sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    short = _gathered({"short": _missing_bytes(root, states)} if rank == 0 else {})["short"]
    if short > 0:
        if rank == 0:
            print(f"warning: step {step} is not saved: {root} lacks {short / 1e9:.1f} GB of free space", flush=True)
        return None
    _barrier()
    engine.save_checkpoint(str(root), tag=temporary.name, save_latest=False)
    _barrier()
    names = sorted(f for f in temporary.rglob("*") if f.is_file())
    files = {}
    for path in names[rank::ranks]:
        _force_to_disk(path)
        files[str(path.relative_to(temporary))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    files = _gathered(files)
    if rank == 0:
        about = {
            "step": step,
            "world_size": ranks,
            "zero_stage": engine.zero_optimization_stage(),
            "versions": {name: version(name) for name in PACKAGES},
            **state,
            "files": dict(sorted(files.items())),
        }
        write_atomically(temporary / "checkpoint.json", json.dumps(about, indent=1).encode())
        _force_to_disk(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        _force_to_disk(root)
        write_atomically(root / "latest", folder.name.encode())
        _forget(root, config)
    _barrier()
    return folder


def _missing_bytes(root: Path, at_least: int) -> float:
    """How much more space another checkpoint needs than there is, going by the newest or, before the first, by
    `at_least`; not above 0: enough."""
    sizes = [at_least]
    for about in sorted(root.glob("step_*/checkpoint.json")):
        sizes = [file["bytes"] for file in json.loads(about.read_text())["files"].values()]
    return SPARE * sum(sizes) - shutil.disk_usage(root).free


def _force_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _forget(root: Path, config: RunConfig) -> None:
    """Delete all but the newest `keep`, and those of every `keep_every` steps."""
    whole = sorted(f for f in root.glob("step_*") if "." not in f.name)
    for old in whole[: -config.checkpoint.keep]:
        every = config.checkpoint.keep_every
        if not every or int(old.name.removeprefix("step_")) % every:
            shutil.rmtree(old)
    for converted in root.glob("step_*.universal"):
        shutil.rmtree(converted, ignore_errors=True)


def _barrier() -> None:
    if _place()[1] > 1:
        dist.barrier()


def resumption(config: RunConfig, ds_config: dict, corpus: str, say=print) -> tuple[Path, dict] | None:
    """What to resume from, before the engine is built: (folder to load, its checkpoint.json), or None.

    Where the number of ranks has changed, the checkpoint is converted to DeepSpeed's universal format beside
    it, and `ds_config` is told to load that. Raises UserError for another ZeRO stage or offload setting, or
    shards other than those of the fingerprint `corpus`.
    """
    found = find(config.run_dir, say=say)
    if found is None:
        return None
    folder, about = found
    stage = ds_config["zero_optimization"]["stage"]
    if about["zero_stage"] != stage:
        raise UserError(
            f"{folder} was written with ZeRO stage {about['zero_stage']}, now {stage}; take that --deepspeed_config, "
            "or export the checkpoint and adapt the export"
        )
    if about["corpus_fingerprint"] != corpus and not config.checkpoint.allow_changes:
        raise UserError(
            f"{folder} was trained on other shards than {config.data.path} has now (at the time: {about['corpus']}); "
            "take those, choose another run_dir, or checkpoint.allow_changes=true to go on with these"
        )
    if about.get("offload", "none") != offload_of(ds_config):
        raise UserError(
            f"{folder} was written with offload_optimizer {about.get('offload', 'none')}, now "
            f"{offload_of(ds_config)}; take that --deepspeed_config, or export the checkpoint and adapt the export"
        )
    ranks = _place()[1]
    if about["world_size"] == ranks or stage == 0:
        return folder, about
    universal = folder.with_name(folder.name + ".universal")
    say(f"{folder.name} was written by {about['world_size']} ranks, now {ranks}: made a universal checkpoint")
    if _place()[0] == 0:
        _convert(folder, universal)
    _barrier()
    ds_config["checkpoint"] = {**ds_config.get("checkpoint", {}), "load_universal": True}
    return universal, about


def offload_of(ds_config: dict) -> str:
    """Where the optimizer's states live beside the device: "none", "cpu" or "nvme"."""
    return ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")


def _convert(folder: Path, universal: Path) -> None:
    """By DeepSpeed's own converter."""
    if universal.exists():
        shutil.rmtree(universal)
    temporary = universal.with_name(universal.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder), "--output_folder", str(temporary)]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    outcome = subprocess.run(command, text=True, capture_output=True, env=clean, check=False)
    if outcome.returncode:
        raise UserError(f"{folder} could not be converted for another number of ranks: {outcome.stderr[-500:]}")
    os.replace(temporary, universal)


def load(engine, found: tuple[Path, dict] | None) -> int:
    """Restore what `resumption` found into `engine`; returns its step, 0 where there is none."""
    if found is None:
        return 0
    folder, about = found
    groups = getattr(engine.optimizer, "optimizer", engine.optimizer).param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise UserError(f"DeepSpeed found nothing to load in {folder}")
    if folder.name.endswith(".universal"):
        _mend(getattr(engine.optimizer, "optimizer", engine.optimizer), settings)
    return about["step"]


def _mend(optimizer, settings: list[dict]) -> None:
    """Undo what DeepSpeed 0.19 does to a universal checkpoint at stage 3.

    It gives every parameter group the settings of the first, weight decay too, and all states one and
    the same step tensor, which then counts once for each of them.
    """
    for group, before in zip(optimizer.param_groups, settings):
        group.update(before)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def write_run(config: RunConfig, tokenizer, model_config) -> None:
    """config.yaml and model/: what a run is, before its first step."""
    run_dir = Path(config.run_dir)
    (run_dir / "model").mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    tokenizer.save_pretrained(run_dir / "model")
    model_config.save_pretrained(run_dir / "model")
