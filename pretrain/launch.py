"""What stands between a command line and a trainer: the files, the corpus, the device and the other ranks."""

import os
import socket
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.log import this_rank
from data_prep import tokenizing, verify

from .config import RunConfig
from .corpora import Corpora, load_corpora

HASH_UP_TO = 4 << 30  # bytes of shards that data.verify=auto reads whole


def packaged(path: str) -> str:
    """`path`, or the file of that name that was installed with the project."""
    installed = Path(__file__).resolve().parents[1] / path
    return str(installed) if not Path(path).exists() and installed.exists() else path


def fast_dtype() -> str:
    """bf16 where this device computes it fast, else fp32."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)  # without AMX, bf16 is far slower than fp32
    return "bf16" if amx is not None and amx() else "fp32"


def check_corpus(config: RunConfig, tokenizer: Any) -> Corpora:
    """All corpora, once their shards are whole, made with this tokenizer, and of the right length. Raises UserError."""
    corpora = load_corpora(config.data.path)
    for folder, manifest in corpora.manifests.items():
        tokenizing.check_same(tokenizer, manifest.tokenizer, folder, f"model.base {config.model.base!r}")
    if this_rank() == 0:
        parts = [source.entry.train + source.entry.validation for source in corpora.sources.values()]
        size = sum(shard.bytes for part in parts for shard in part)
        hashes = config.data.verify == "sha256" or (config.data.verify == "auto" and size <= HASH_UP_TO)
        problems = [problem for folder in corpora.manifests for problem in verify.check(folder, hashes=hashes)]
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise UserError(
                f"{problems[0]}{more}; run `python -m data_prep repair CONFIG`, with the configuration of the corpus"
            )
    corpora.check_length(config.train.seq_len)
    return corpora


def launch_environment() -> int:
    """Fill in what a launcher would set, for srun or a plain `python pretrain/main.py`; returns the world size."""
    step = os.environ.get("SLURM_STEP_NUM_TASKS")  # set by srun, one process a task, and not in the batch script
    if step and "RANK" not in os.environ:
        os.environ |= {"RANK": os.environ["SLURM_PROCID"], "WORLD_SIZE": step}
        os.environ |= {"LOCAL_RANK": os.environ["SLURM_LOCALID"]}
        a_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", step)  # such as 8(x4)
        os.environ.setdefault("LOCAL_WORLD_SIZE", a_node.partition("(")[0].partition(",")[0])
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    return int(os.environ["WORLD_SIZE"])


def start_ranks(config: RunConfig, world_size: int) -> None:
    """This rank's device and threads, and the process group."""
    import torch

    # DeepSpeed calls collectives by names that torch has deprecated; one line a rank and a name otherwise
    warnings.filterwarnings("ignore", message=".*torch.distributed", category=FutureWarning)
    import deepspeed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    # A kernel for inference on CPUs, which DeepSpeed would compile here; a launch killed in the middle of that leaves a
    # lock file, for which all later ones would wait without end.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # later than the watchdog's, whose report says more
    deepspeed.init_distributed(timeout=timedelta(minutes=max(30, config.guards.stall_minutes + 10)))
