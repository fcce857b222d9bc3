"""Adapt an AR model into a masked diffusion model; the same command again resumes.

    deepspeed pretrain/main.py --config pretrain/configs/diffugpt_s.yaml --deepspeed_config ds_configs/zero2.json
    torchrun --nproc_per_node 8 pretrain/main.py --config ... --deepspeed_config ... train.seed=7
    python pretrain/main.py --config pretrain/configs/diffullama_7b.yaml --dry_run --world_size 16

`key=value` overrides the configuration file; a dot descends: optimizer.lr=1e-4. Unknown keys are errors.
"""

import argparse
import os
import socket
import sys
import warnings
from datetime import timedelta
from pathlib import Path

if not __package__:  # run as a file: find the project, and keep pretrain/*.py from standing as top-level modules
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.config import load_config
from common.errors import UserError
from data_prep import shards, tokenizing
from pretrain.config import RunConfig, accumulation_steps, check_run

HASH_UP_TO = 4 << 30  # bytes of shards that data.verify=auto reads whole


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pretrain/main.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="run configuration, such as pretrain/configs/diffugpt_s.yaml")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero3.json", help="default: %(default)s")
    parser.add_argument("--dry_run", action="store_true", help="check, print the plan, start nothing")
    parser.add_argument("--world_size", type=int, help="ranks that --dry_run plans for; default: as launched, or 1")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args(argv)


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


def check_corpus(config: RunConfig, tokenizer) -> shards.Manifest:
    """The manifest, once the shards are whole and made with this tokenizer. Raises UserError."""
    manifest = shards.Manifest.load(config.data.path)
    found, expected = tokenizing.fingerprint(tokenizer), manifest.tokenizer["fingerprint"]
    if found != expected:
        raise UserError(
            f"{config.data.path} was tokenised with {manifest.tokenizer['name']!r} (fingerprint {expected[:12]}…), "
            f"but model.base {config.model.base!r} has another tokenizer ({found[:12]}…); "
            "prepare the corpus with the base's tokenizer"
        )
    if int(os.environ.get("RANK", 0)) == 0:
        size = sum(shard.bytes for source in manifest.sources for shard in source.train + source.validation)
        hashes = config.data.verify == "sha256" or (config.data.verify == "auto" and size <= HASH_UP_TO)
        problems = shards.check(config.data.path, hashes=hashes)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise UserError(f"{problems[0]}{more}; prepare the corpus again")
    return manifest


def dry_run(args: argparse.Namespace, config: RunConfig, dtype: str) -> None:
    from pretrain import deepspeed_config, plan

    world_size = args.world_size or int(os.environ.get("WORLD_SIZE", 1))
    shape = plan.shape_of(config)
    seq_len = config.train.seq_len
    if seq_len is None:  # then only the shards can tell
        seq_len = shards.Manifest.load(config.data.path).seq_len
    ds_config = deepspeed_config.resolve(
        packaged(args.deepspeed_config), config, dtype, shape.hidden_size, world_size
    )  # fmt: skip
    print(plan.describe(config, ds_config, shape, seq_len, world_size))


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


def run(args: argparse.Namespace) -> int:
    """Returns the exit code. Raises UserError."""
    config = load_config(RunConfig, packaged(args.config), args.overrides)
    check_run(config)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dtype = fast_dtype() if config.model.dtype == "auto" else config.model.dtype
    if args.dry_run:
        dry_run(args, config, dtype)
        return 0

    from pretrain import adapt, checkpoint, deepspeed_config

    world_size = launch_environment()
    accumulation_steps(config, world_size)
    checkpoint.check_same_run(config)
    tokenizer = adapt.load_tokenizer(config.model)
    manifest = check_corpus(config, tokenizer)
    if config.train.seq_len not in (None, manifest.seq_len):
        raise UserError(
            f"{config.data.path} has rows of {manifest.seq_len} tokens, but train.seq_len is {config.train.seq_len}"
        )
    base = adapt.base_config(config.model, manifest.seq_len)
    mask_token_id = adapt.add_mask_token(tokenizer, config.model)
    backends = adapt.check_acceleration(
        config.model,
        {"full", "full" if config.annealing.form == "none" else config.annealing.form},
        "cuda" if torch.cuda.is_available() else "cpu",
        torch.bfloat16 if dtype == "bf16" else torch.float32,
    )
    if int(os.environ.get("RANK", 0)) == 0:
        print("attention: " + ", ".join(f"{form} by {name}" for form, name in backends.items()), flush=True)
    ds_config = deepspeed_config.resolve(
        packaged(args.deepspeed_config), config, dtype, base.hidden_size, world_size
    )  # fmt: skip

    # DeepSpeed calls collectives by names that torch has deprecated; one line a rank and a name otherwise
    warnings.filterwarnings("ignore", message=".*torch.distributed", category=FutureWarning)
    import deepspeed
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    # later than the watchdog's, whose report says more
    deepspeed.init_distributed(timeout=timedelta(minutes=max(30, config.guards.stall_minutes + 10)))
    from pretrain.trainer import train

    try:
        return train(config, base, tokenizer, mask_token_id, ds_config)
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    try:
        return run(arguments(argv))
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
