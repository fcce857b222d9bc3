"""What tests import: paths, small configurations, a launcher, waits with a deadline, and the comparer of metrics.

Fixtures are in conftest.py.
"""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from forked import Forked

from data_prep.config import PrepareConfig, SourceConfig
from pretrain.runtime.metrics import reproducible

ROOT = Path(__file__).resolve().parents[1]
TALES = ROOT / "data_prep" / "demo" / "tales.jsonl"
SHARED = ROOT.parent / "shared"  # tokenizers and texts that are not in the repository; tests that use them skip without
VOCABULARY = 384

START_SECONDS = 120  # within which a launched run has to come to its first steps, on a busy machine
FAILED_SECONDS = 30  # that the other ranks get to end by themselves after one has failed


def config(folder: Path, tokenizer_dir: Path, paths: list[Path], **settings) -> PrepareConfig:
    """One source `s` of these files, prepared into folder/out."""
    source = SourceConfig("s", [str(path) for path in paths])
    return PrepareConfig([source], str(tokenizer_dir), output_dir=str(folder / "out"), **{"seq_len": 64, **settings})


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """One document a line, in the field `text`."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def tiny_config(family: str, vocabulary: int = VOCABULARY):
    """The configuration of a causal LM with 2 layers of width 32."""
    from transformers import (
        Gemma3TextConfig,
        GPT2Config,
        LlamaConfig,
        MistralConfig,
        Olmo2Config,
        Qwen2Config,
        Qwen3Config,
        SmolLM3Config,
    )

    special = {"bos_token_id": 1, "eos_token_id": 0}
    grouped = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        **special,
    }
    return {
        "llama": lambda: LlamaConfig(**grouped, tie_word_embeddings=False),
        "llama_padded": lambda: LlamaConfig(**{**grouped, "vocab_size": vocabulary + 7}, tie_word_embeddings=False),
        "llama_tied": lambda: LlamaConfig(**grouped, tie_word_embeddings=True),
        "qwen2": lambda: Qwen2Config(**grouped),
        "qwen3": lambda: Qwen3Config(**grouped, head_dim=16),
        "gemma3": lambda: Gemma3TextConfig(**grouped, head_dim=8, sliding_window=64, pad_token_id=0),
        "olmo2": lambda: Olmo2Config(**grouped, pad_token_id=0),
        "smollm3": lambda: SmolLM3Config(**grouped, pad_token_id=0),
        "mistral": lambda: MistralConfig(**grouped, sliding_window=None),
        "gpt2": lambda: GPT2Config(
            vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=256, **special
        ),
    }[family]()  # fmt: skip


def assert_same_metrics(a: list[dict], b: list[dict], rel: float = 0.0) -> None:
    """Two runs are the same run: the same steps, the same metrics in each, every value equal.

    Equal to the bit, or within `rel` of each other. Only what depends on the machine is left out, and evaluations.
    """
    assert a, "there is nothing to compare"
    assert [m["step"] for m in a] == [m["step"] for m in b]
    for one, other in zip(a, b):
        one, other = reproducible(one), reproducible(other)
        assert one.keys() == other.keys(), f"step {one['step']} has different metrics"
        for key, value in one.items():
            expected = pytest.approx(other[key], rel=rel, abs=0) if rel else other[key]
            assert value == expected, f"{key} of step {one['step']}"


def wait_for(
    condition: Callable[[], object],
    seconds: float,
    what: str | Callable[[], str],
    alive: Iterable[Forked] = (),
    pause: float = 0.002,
) -> None:
    """Poll every `pause` seconds until `condition()` holds; raise, naming `what` it waited for, after `seconds`.

    At once where a process of `alive` has ended before.
    """

    def waited_for() -> str:
        return what if isinstance(what, str) else what()

    deadline = time.monotonic() + seconds
    while not condition():
        for process in alive:
            if process.poll() is not None and not condition():
                raise AssertionError(f"a process ended with {process.returncode} before {waited_for()}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds} s: not {waited_for()}")
        time.sleep(pause)


def launch(
    ranks: int, arguments: list[str], cwd: Path = ROOT, launcher: str = "processes", timeout: float = 300
) -> subprocess.CompletedProcess:
    """Run a script on `ranks` CPU processes of one thread; returns its outcome.

    `launcher` is torchrun, deepspeed, or "processes": as srun starts them, without a launcher's or imports' time.
    A run that takes longer than `timeout` seconds is killed, and its exit code is not 0.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if launcher == "processes":
            started = start(ranks, arguments, folder, cwd)
        else:
            started = [_start_launcher(launcher, ranks, arguments, folder, cwd)]
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in started) and time.monotonic() < deadline:
                if any(process.returncode for process in started):  # the others may wait for it for ever
                    deadline = min(deadline, time.monotonic() + FAILED_SECONDS)
                time.sleep(0.02)
        finally:
            if launcher != "processes" and started[0].poll() is None:  # its ranks are in sessions of their own
                started[0].terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started[0].wait(FAILED_SECONDS)
            kill(started)
        out, err = (
            "".join(path.read_text(errors="replace") for path in sorted(folder.glob(f"{kind}.*")))
            for kind in ("out", "err")
        )
    if time.monotonic() > deadline:
        err += f"\nkilled: it had not ended after {timeout} s, or {FAILED_SECONDS} s after a rank had failed"
    codes = [process.returncode for process in started]
    code = next((code for code in codes if code > 0), min(codes))  # that of a killed process says less
    return subprocess.CompletedProcess(arguments, code, out, err)


def run(ranks: int, arguments: list[str], expected: int = 0, launcher: str = "processes") -> str:
    """As `launch`, with an exit code that must be `expected`; returns all that was printed."""
    outcome = launch(ranks, arguments, launcher=launcher)
    printed = outcome.stdout + outcome.stderr
    assert outcome.returncode == expected, printed[-4000:]
    return printed


def run_all(
    ranks: int,
    runs: list[tuple[list[str], Path]],
    expected: int = 0,
    patched: str | None = None,
    launcher: str = "processes",
) -> str:
    """Make several of `tiny_run`'s runs, one after the other in one process group; returns all that was printed.

    Each must end with the exit code `expected`. `patched` is a mode of tests/scripts/patched.py.
    """
    script = ["tests/scripts/patched.py", patched] if patched else ["tests/scripts/runs.py"]
    with tempfile.TemporaryDirectory() as name:
        listed = Path(name) / "runs.json"
        listed.write_text(json.dumps({"runs": [arguments[1:] for arguments, _ in runs], "expected": expected}))
        return run(ranks, [*script, str(listed)], launcher=launcher)


def error_lines(printed: str) -> list[str]:
    """The lines that report an error."""
    return [line for line in printed.splitlines() if line.startswith("error:")]


def start(ranks: int, arguments: list[str], folder: Path, cwd: Path = ROOT) -> list[Forked]:
    """Start one process a rank, as srun does; their output goes to folder/out.RANK and folder/err.RANK."""
    common = {**_environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [
        Forked(
            arguments, cwd, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            folder / f"out.{rank}", folder / f"err.{rank}",
        )
        for rank in range(ranks)
    ]  # fmt: skip


def _start_launcher(launcher: str, ranks: int, arguments: list[str], folder: Path, cwd: Path) -> subprocess.Popen:
    binary = Path(sys.executable)
    if launcher == "deepspeed":
        command = [str(binary.with_name("deepspeed")), "--num_accelerators", str(ranks), "--master_port", free_port()]
    else:
        command = [str(binary), "-m", "torch.distributed.run"]
        command += ["--nproc_per_node", str(ranks), "--master_port", free_port()]
    with open(folder / "out.0", "wb") as out, open(folder / "err.0", "wb") as err:
        return subprocess.Popen([*command, *arguments], cwd=cwd, env=_environment(), stdout=out, stderr=err)


def _environment() -> dict[str, str]:
    """Of a process on a CPU with one thread."""
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    settings |= {
        "TORCHDYNAMO_DISABLE": "1"
    }  # DeepSpeed would import the compiler, for a second, for an unused optimizer
    return {**os.environ, **settings}


def kill(processes: Iterable[Forked | subprocess.Popen]) -> None:
    """SIGKILL what still runs, and wait for the end."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait(60)


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
