"""Peak host memory of each rank while a model of 1B parameters is loaded under ZeRO-3, and while it is exported.

    python benchmarks/host_memory.py [--ranks 4] [--folder /tmp/host_memory]

Writes benchmarks/host_memory.md. A rank that never holds a full copy stays below 1. Only anonymous memory is counted:
pages of mapped files do not count against a machine's limit, since they are given back when memory is needed.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from common.cli import command, make_parser
from common.files import sha256_of

ROOT = Path(__file__).resolve().parents[1]
SHARD = 500_000_000  # bytes of a weights file of the export
STAGES = (1, 2, 3)
SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip  (TinyLlama's)


class Peak(threading.Thread):
    """Anonymous memory of this process beyond what it had at the start: bytes, sampled every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_value = _anonymous()
        self.value = 0
        self.ended = False
        self.start()

    def run(self) -> None:
        """The thread: remember the largest value."""
        while not self.ended:
            self.value = max(self.value, _anonymous() - self.start_value)
            time.sleep(0.005)


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def make_base(folder: Path) -> int:
    """A checkpoint of random weights in two shards, as Llama-2-7B's; returns its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        config = LlamaConfig(**SHAPE)
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        model.save_pretrained(folder, max_shard_size="1500MB")
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def load_here(folder: str) -> None:
    """One rank: the product's own loading. Prints the peak."""
    import deepspeed
    from transformers import AutoConfig
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from pretrain import adapt
    from pretrain.config import ModelConfig

    deepspeed.init_distributed()
    ds_config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    keep = HfDeepSpeedConfig(ds_config)
    config = AutoConfig.from_pretrained(folder)
    peak = Peak()
    model = adapt.load_model(ModelConfig(base=folder), config, 32_000, torch.bfloat16)
    time.sleep(0.05)
    peak.ended = True
    held = sum(getattr(p, "ds_tensor", p).numel() * 2 for p in model.parameters())
    print(f"peak {peak.value} held {held}", flush=True)
    del keep


def load(folder: Path, ranks: int) -> list[tuple[int, int]]:
    """(peak, held at the end) of each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = []
    for rank in range(ranks):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = [sys.executable, __file__, "--rank_of", str(folder)]
        started.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment))
    lines = [line for process in started for line in process.communicate()[0].splitlines() if line.startswith("peak ")]
    return [(int(line.split()[1]), int(line.split()[3])) for line in lines]


def make_run(base: Path, folder: Path, stage: int, ranks: int = 2) -> None:
    """A run of one step whose checkpoint holds the base's weights as DeepSpeed lays them out, without moments.

    The tests compare exports of real checkpoints to the bit; this one is for its size.
    """
    from safetensors import safe_open
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, PreTrainedTokenizerFast

    from pretrain.config import ModelConfig, RunConfig
    from pretrain.runtime.resume import write_run

    config = AutoConfig.from_pretrained(base)
    config.mask_token_id, config.diffusion, config.dtype = 0, {"shift": True}, torch.bfloat16
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"m": 0}, "m")), mask_token="m")
    write_run(RunConfig(str(folder), model=ModelConfig(base=str(base))), tokenizer, config)
    (folder / "metrics.jsonl").touch()
    checkpoint = folder / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    files = {name: path for path in base.glob("*.safetensors") for name in safe_open(path, "pt").keys()}  # noqa: SIM118
    shapes, flat = {}, [[] for _ in range(ranks)]
    for name, path in files.items():
        weight = safe_open(path, "pt").get_tensor(name).float()
        shapes[name] = weight.shape
        if stage == 3:  # each parameter in one piece a rank
            for pieces, piece in zip(flat, weight.flatten().chunk(ranks)):
                pieces.append(piece.clone())
        else:
            flat[0].append(weight.flatten())
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    if stage != 3:  # the whole in one piece a rank
        flat = [[piece] for piece in torch.cat(flat[0]).chunk(ranks)]
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    model = {"param_shapes": [shapes], "shared_params": {}}
    torch.save(model, checkpoint / f"{prefix}mp_rank_00_model_states.pt")
    for rank, pieces in enumerate(flat):
        state = {"optimizer_state_dict": {key: [torch.cat(pieces)]}}
        torch.save(state, checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    listed = {f.name: {"bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in checkpoint.iterdir()}
    about = {"step": 1, "tokens": 0, "dtype": "bf16", "zero_stage": stage, "world_size": ranks, "files": listed}
    (checkpoint / "checkpoint.json").write_text(json.dumps(about))


def export_here(run_dir: str) -> None:
    """Export in files of SHARD bytes. Prints the peak."""
    from tools.export import export

    with tempfile.TemporaryDirectory() as folder:
        peak = Peak()
        export(run_dir, Path(folder) / "exported", max_shard_size=f"{SHARD // 10**6}MB")
        peak.ended = True
    print(f"peak {peak.value}", flush=True)


def export_peak(base: Path, stage: int) -> int:
    """Bytes at the peak of an export of a ZeRO checkpoint of the base, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=base.parent) as folder:
        making = [sys.executable, __file__, "--make_run", str(base), folder, str(stage)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(making, check=True, env=environment)
        exporting = [sys.executable, __file__, "--export_of", folder]
        outcome = subprocess.run(exporting, check=True, env=environment, capture_output=True, text=True)
        return int(next(line.split()[1] for line in outcome.stdout.splitlines() if line.startswith("peak ")))


@command
def main(argv: list[str] | None = None) -> int:
    """Measure loading and, with --run, exporting; write the table."""
    parser = make_parser("benchmarks/host_memory.py", __doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--folder", default="/tmp/host_memory", help="where the base of random weights is made")
    parser.add_argument("--write", type=Path, default=Path(__file__).with_suffix(".md"), help="default: %(default)s")
    parser.add_argument("--rank_of", help=argparse.SUPPRESS)
    parser.add_argument("--make_run", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--export_of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank_of:
        load_here(args.rank_of)
        return 0
    if args.make_run:
        make_run(Path(args.make_run[0]), Path(args.make_run[1]), int(args.make_run[2]))
        return 0
    if args.export_of:
        export_here(args.export_of)
        return 0
    copy = make_base(Path(args.folder))
    lines = [
        f"Loading {copy / 2e9:.1f}B parameters under ZeRO-3 on {args.ranks} ranks, in full copies (bf16):",
        "",
        "| rank | peak | held afterwards |",
        "| --- | --- | --- |",
    ]
    for rank, (peak, held) in enumerate(load(Path(args.folder), args.ranks)):
        lines.append(f"| {rank} | {peak / copy:.2f} | {held / copy:.2f} |")
    largest = 4 * SHAPE["vocab_size"] * SHAPE["hidden_size"]
    lines += [
        "",
        f"Exporting them (bf16) from checkpoints of 2 ranks in files of {SHARD / 1e9:g} GB; the largest tensor takes "
        f"{largest / 1e9:.2f} GB in fp32:",
        "",
        "| ZeRO stage | peak, GB |",
        "| --- | --- |",
    ]
    for stage in STAGES:
        lines.append(f"| {stage} | {export_peak(Path(args.folder), stage) / 1e9:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    args.write.write_text(f"`python benchmarks/host_memory.py` wrote this.\n\n{text}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
