"""What is saved, and how it is found again.

    RUN_DIR/checkpoints/step_00000100/         DeepSpeed's files and checkpoint.json
    RUN_DIR/checkpoints/latest                 the name of the newest whole one

A checkpoint is written under a temporary name, hashed, forced to disk and renamed: a folder named step_* is
whole. A run resumes from the newest one whose files are what checkpoint.json says.
"""

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import force_to_disk, sha256_of, write_atomically
from common.log import log

from ..config import CheckpointConfig
from .ranks import barrier, gathered, rank_and_world_size

PACKAGES = ("torch", "deepspeed", "transformers")
ADAM_BYTES = 12  # a parameter: fp32 copy and two moments
SPARE = 1.1  # times the newest checkpoint's size that must be free before another is written


def checkpoint_id(folder: Path) -> str:
    """Tells a checkpoint from another one of the same step, as a run has them that is rolled back or begun again."""
    return sha256_of(folder / "checkpoint.json")[:16]


def verify_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where its files are what checkpoint.json says. All ranks share the work."""
    try:
        files = json.loads((folder / "checkpoint.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{folder / 'checkpoint.json'} cannot be read ({type(error).__name__})"
    rank, ranks = rank_and_world_size()
    problems = {}
    for name, expected in sorted(files.items())[rank::ranks]:
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != expected["bytes"]:
            found = "missing" if size is None else f"{size} bytes"
            problems[name] = f"{path}: {found}, expected {expected['bytes']} bytes"
        elif sha256_of(path) != expected["sha256"]:
            problems[name] = f"{path}: its content changed (sha256)"
    problems = gathered(problems)
    return min(problems.values()) if problems else None


def find_checkpoint(
    run_dir: str | Path, step: int | None = None, at_most: int | None = None, world_size: int | None = None
) -> tuple[Path, dict] | None:
    """The newest checkpoint that verifies, or that of `step`, with its checkpoint.json; None where there is none.

    `at_most` leaves out those of later steps, `world_size` those written by other numbers of ranks. Each that is
    skipped is logged with the reason. Raises UserError when none of those there are verifies. All ranks call it
    together.
    """
    root = Path(run_dir) / "checkpoints"
    folders = sorted((f for f in root.glob("step_*") if f.name.count(".") == 0), reverse=True)
    if step is not None:
        folders = [f for f in folders if f.name == f"step_{step:08d}"]
    if at_most is not None:
        folders = [f for f in folders if f.name <= f"step_{at_most:08d}"]
    problem = None
    for folder in folders:
        problem = verify_checkpoint(folder)
        if problem is None:
            about = json.loads((folder / "checkpoint.json").read_text())
            if world_size in (None, about["world_size"]):
                return folder, about
            problem = f"{folder} was written by {about['world_size']} ranks"
        if step is None:
            log.info("%s is skipped: %s", folder.name, problem)
    if folders and world_size is None:
        raise UserError(f"no checkpoint in {root} can be used; the last looked at: {problem}")
    return None


def save_checkpoint(engine: Any, run_dir: str | Path, config: CheckpointConfig, step: int, state: dict) -> Path | None:
    """Save after `step` steps; all ranks call it together. `state` is kept in checkpoint.json.

    None where the disk has no room for another: the run goes on with the checkpoints that it has. Raises UserError
    where writing fails all the same; then this rank ends, and the others with it.
    """
    root = Path(run_dir) / "checkpoints"
    try:
        return _save(engine, root, config, step, state)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # how torch words a failed write
            raise
        rank, _ = rank_and_world_size()
        reason = str(error).splitlines()[0]
        problem = f"rank {rank} could not write step {step} to {root} ({reason}); earlier checkpoints are complete"
        if rank:  # main speaks for rank 0 alone
            log.error("%s", problem)
        raise UserError(problem) from error


def _save(engine: Any, root: Path, config: CheckpointConfig, step: int, state: dict) -> Path | None:
    folder = root / f"step_{step:08d}"
    temporary = folder.with_name(folder.name + ".tmp")
    rank, ranks = rank_and_world_size()
    if rank == 0:
        for old in root.glob("step_*.tmp"):  # of a process that was killed
            shutil.rmtree(old, ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
    states = ADAM_BYTES * sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    short = gathered({"short": missing_bytes(root, states)} if rank == 0 else {})["short"]
    if short > 0:
        log.warning("step %d is not saved: %s lacks %.1f GB of free space", step, root, short / 1e9)
        return None
    barrier()
    engine.save_checkpoint(str(root), tag=temporary.name, save_latest=False)
    barrier()
    names = sorted(f for f in temporary.rglob("*") if f.is_file())
    files = {}
    for path in names[rank::ranks]:
        force_to_disk(path)
        files[str(path.relative_to(temporary))] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    files = gathered(files)
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
        force_to_disk(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        force_to_disk(root)
        write_atomically(root / "latest", folder.name.encode())
        _delete_old(root, config)
    barrier()
    return folder


def missing_bytes(root: Path, at_least: int) -> float:
    """Bytes missing for another checkpoint; 0 or less means there is room.

    It will need what the newest one takes or, before the first, `at_least`.
    """
    sizes = [at_least]
    for about in sorted(root.glob("step_*/checkpoint.json")):
        sizes = [file["bytes"] for file in json.loads(about.read_text())["files"].values()]
    return SPARE * sum(sizes) - shutil.disk_usage(root).free


def _delete_old(root: Path, config: CheckpointConfig) -> None:
    """Delete all but the newest `keep`, and those of every `keep_every` steps."""
    whole = sorted(f for f in root.glob("step_*") if "." not in f.name)
    for old in whole[: -config.keep]:
        every = config.keep_every
        if not every or int(old.name.removeprefix("step_")) % every:
            shutil.rmtree(old)
    for converted in root.glob("step_*.universal"):
        shutil.rmtree(converted, ignore_errors=True)
