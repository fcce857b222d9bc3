"""What is saved and how it is found again.

    RUN_DIR/config.yaml                        the resolved configuration
    RUN_DIR/model/                             config.json and tokenizer of the adapted model, no weights
    RUN_DIR/checkpoints/step_00000100/         DeepSpeed's files and checkpoint.json
    RUN_DIR/checkpoints/latest                 the name of the newest whole one

A checkpoint is written under a temporary name and renamed, so a folder named step_* is whole.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from data_prep.config import UserError, load_config, save_config
from data_prep.shards import write_atomically

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
    "wandb",
)


def check_same_run(config: RunConfig) -> None:
    """Raise UserError when RUN_DIR holds a run whose configuration would compute something else."""
    path = Path(config.run_dir) / "config.yaml"
    if not path.exists():
        return
    before, now = (_flat(asdict(c)) for c in (load_config(RunConfig, path), config))
    for key in sorted(before.keys() | now.keys()):
        free = any(key == name or key.startswith(name + ".") for name in FREE)
        if key in ("train.steps", "train.tokens") and now["optimizer.schedule"] == "constant":
            free = True  # a longer run at a constant rate is the same run
        if not free and before.get(key) != now.get(key):
            raise UserError(
                f"{config.run_dir} holds a run with {key}={before.get(key)}, but {now.get(key)} was asked for; "
                "choose another run_dir, or the same value to resume"
            )


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def find(run_dir: str | Path, step: int | None = None) -> tuple[Path, dict] | None:
    """The newest checkpoint, or that of `step`, with its checkpoint.json; None where there is none.

    Raises UserError if it is damaged.
    """
    root = Path(run_dir) / "checkpoints"
    if step is not None:
        folder = root / f"step_{step:08d}"
    elif (root / "latest").exists():
        folder = root / (root / "latest").read_text().strip()
    else:
        return None
    if not (folder / "checkpoint.json").exists():
        if step is not None and not folder.exists():
            return None
        raise UserError(f"{folder} is not there or not whole; write the name of another step_* into {root / 'latest'}")
    about = json.loads((folder / "checkpoint.json").read_text())
    for name, size in about["files"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            raise UserError(
                f"{folder / name}: {'missing' if found is None else f'{found} bytes'}, expected {size} bytes; "
                f"write the name of an older checkpoint into {root / 'latest'} to resume from that"
            )
    return folder, about


def save(engine, config: RunConfig, step: int, state: dict) -> Path:
    """Save after `step` steps; all ranks call it together. `state` is kept in checkpoint.json."""
    folder = Path(config.run_dir) / "checkpoints" / f"step_{step:08d}"
    temporary = folder.with_name(folder.name + ".tmp")
    leader = dist.get_rank() == 0
    if leader:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(folder.parent), tag=temporary.name, save_latest=False)
    dist.barrier()
    if leader:
        files = {str(f.relative_to(temporary)): f.stat().st_size for f in sorted(temporary.rglob("*")) if f.is_file()}
        about = {
            "step": step,
            "world_size": dist.get_world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            **state,
            "files": files,
        }
        write_atomically(temporary / "checkpoint.json", json.dumps(about, indent=1).encode())
        os.replace(temporary, folder)
        write_atomically(folder.parent / "latest", folder.name.encode())
        whole = sorted(f for f in folder.parent.glob("step_*") if not f.name.endswith(".tmp"))
        for old in whole[: -config.checkpoint.keep]:
            shutil.rmtree(old)
    dist.barrier()
    return folder


def load(engine, run_dir: str | Path) -> int:
    """Restore the newest checkpoint into `engine`; returns its step, 0 where there is none.

    Raises UserError when it was written by another number of ranks or another ZeRO stage.
    """
    found = find(run_dir)
    if found is None:
        return 0
    folder, about = found
    for key, now, owner in (
        ("world_size", dist.get_world_size(), "ranks"),
        ("zero_stage", engine.zero_optimization_stage(), "as ZeRO stage"),
    ):
        if about[key] != now:
            raise UserError(f"{folder} was written with {about[key]} {owner}, now {now}; start with {about[key]} again")
    path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise UserError(f"DeepSpeed found nothing to load in {folder}")
    return about["step"]


def write_run(config: RunConfig, tokenizer, model_config) -> None:
    """config.yaml and model/: what a run is, before its first step."""
    run_dir = Path(config.run_dir)
    (run_dir / "model").mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    tokenizer.save_pretrained(run_dir / "model")
    model_config.save_pretrained(run_dir / "model")
