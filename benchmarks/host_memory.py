"""Peak host memory of each rank while a model of 1B parameters is loaded under ZeRO-3, and while it is exported.

    python benchmarks/host_memory.py [--ranks 4] [--folder /tmp/host_memory] [--run runs/demo]

Writes benchmarks/host_memory.md. A rank that never holds a full copy stays below 1. Only anonymous memory is counted:
pages of mapped files do not count against a machine's limit, since they are given back when memory is needed.
"""

import argparse
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

ROOT = Path(__file__).resolve().parents[1]
FILES = 8  # that an export writes
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


def export_here(run_dir: str) -> tuple[int, int]:
    """(peak, bytes of the fp32 copy) of an export that writes about FILES files."""
    from transformers import AutoConfig

    from pretrain.plan import parameters
    from tools.export import export

    copy = 4 * parameters(AutoConfig.from_pretrained(Path(run_dir) / "model"))
    with tempfile.TemporaryDirectory() as folder:
        peak = Peak()
        export(run_dir, Path(folder) / "exported", dtype="fp32", max_shard_size=f"{max(1, copy // FILES // 10**6)}MB")
        peak.ended = True
    return peak.value, copy


@command
def main(argv: list[str] | None = None) -> int:
    """Measure loading and, with --run, exporting; write the table."""
    parser = make_parser("benchmarks/host_memory.py", __doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--folder", default="/tmp/host_memory", help="where the base of random weights is made")
    parser.add_argument("--run", help="a run of ZeRO-3, such as runs/demo, to export")
    parser.add_argument("--write", type=Path, default=Path(__file__).with_suffix(".md"), help="default: %(default)s")
    parser.add_argument("--rank_of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank_of:
        load_here(args.rank_of)
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
    if args.run:
        peak, copy = export_here(args.run)
        share = f"{peak / copy:.2f} of a full copy (fp32) at the peak"
        lines += ["", f"Exporting a ZeRO-3 checkpoint in {FILES} files: {share}."]
    text = "\n".join(lines) + "\n"
    print(text)
    args.write.write_text(f"`python benchmarks/host_memory.py` wrote this.\n\n{text}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
