"""Going on where a run stopped: is it the same run, from which checkpoint, and into the engine with it.

RUN_DIR/config.yaml                        the resolved configuration
RUN_DIR/model/                             config.json and tokenizer of the trained model, no weights
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from common.config import fixed_settings, load_config, save_config
from common.errors import UserError
from common.log import log

from ..config import RunConfig
from ..corpora import shown
from .checkpoint import find_checkpoint
from .ranks import barrier, rank_and_world_size

# Settings of another model: no checkpoint of the run fits it.
ANOTHER_MODEL = ("objective", "model.init", "model.mask_token", "model.mask_token_id")


def check_same_run(config: RunConfig) -> None:
    """Raise UserError when RUN_DIR holds a run whose configuration would compute something else."""
    path = Path(config.run_dir) / "config.yaml"
    if not path.exists():
        return
    before = fixed_settings(load_config(RunConfig, path))
    for key, now in fixed_settings(config).items():
        if key in ("train.steps", "train.tokens") and config.optimizer.schedule == "constant":
            continue  # a longer run at a constant rate is the same run
        if config.checkpoint.allow_changes and key not in ANOTHER_MODEL:
            continue
        if before[key] != now:
            raise UserError(
                f"{config.run_dir} holds a run with {key}={before[key]}, but {now} was asked for; "
                "choose another run_dir, the same value to resume"
                + ("" if key in ANOTHER_MODEL else ", or checkpoint.allow_changes=true")
            )


def write_run(config: RunConfig, tokenizer: Any, model_config: Any) -> None:
    """config.yaml and model/: what a run is, before its first step."""
    run_dir = Path(config.run_dir)
    (run_dir / "model").mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    tokenizer.save_pretrained(run_dir / "model")
    model_config.save_pretrained(run_dir / "model")


def find_resume_checkpoint(config: RunConfig, ds_config: dict, corpus: str) -> tuple[Path, dict] | None:
    """What to resume from, before the engine is built: (folder to load, its checkpoint.json), or None.

    Where the number of ranks has changed, the checkpoint is converted to DeepSpeed's universal format beside
    it, and `ds_config` is told to load that. Raises UserError for another ZeRO stage or offload setting, or
    shards other than those of the fingerprint `corpus`.
    """
    found = find_checkpoint(config.run_dir)
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
            f"{folder} was trained on other shards than {shown(config.data.path)} has now "
            f"(at the time: {shown(about['corpus'])}); "
            "take those, choose another run_dir, or checkpoint.allow_changes=true to go on with these"
        )
    if about.get("offload", "none") != offload_device(ds_config):
        raise UserError(
            f"{folder} was written with offload_optimizer {about.get('offload', 'none')}, now "
            f"{offload_device(ds_config)}; take that --deepspeed_config, or export the checkpoint and adapt the export"
        )
    rank, ranks = rank_and_world_size()
    if about["world_size"] == ranks or stage == 0:
        return folder, about
    universal = folder.with_name(folder.name + ".universal")
    log.info("%s was written by %d ranks, now %d: made a universal checkpoint", folder.name, about["world_size"], ranks)
    if rank == 0:
        _convert(folder, universal)
    barrier()
    ds_config["checkpoint"] = {**ds_config.get("checkpoint", {}), "load_universal": True}
    return universal, about


def offload_device(ds_config: dict) -> str:
    """Where the optimizer's states live beside the accelerator: "none", "cpu" or "nvme"."""
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


def load_checkpoint(engine: Any, found: tuple[Path, dict] | None) -> int:
    """Restore what was found into `engine`; returns its step, 0 for None."""
    if found is None:
        return 0
    folder, about = found
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise UserError(f"DeepSpeed found nothing to load in {folder}")
    if folder.name.endswith(".universal"):
        fix_universal_state(getattr(engine.optimizer, "optimizer", engine.optimizer), settings)
    return about["step"]


def fix_universal_state(optimizer: Any, settings: list[dict]) -> None:
    """Undo what DeepSpeed 0.19 does to a universal checkpoint at stage 3.

    It gives every parameter group the settings of the first, weight decay too, and all states one and
    the same step tensor, which then counts once for each of them.
    """
    for group, before in zip(optimizer.param_groups, settings):
        group.update(before)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
