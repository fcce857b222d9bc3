"""Small real things for tests: a trained tokenizer, models of four families, a corpus, a launcher."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from slurm_cluster import cluster  # noqa: F401, a fixture

from data_prep.config import PrepareConfig, SourceConfig

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

ROOT = Path(__file__).resolve().parents[1]
TALES = ROOT / "data_prep" / "demo" / "tales.jsonl"
SHARED = ROOT.parent / "shared"
VOCABULARY = 384


# Files that take longest begin first, so that both workers of `make test` end together.
SLOWEST = ("test_resume.py", "test_training.py", "test_guards.py", "test_train.py", "test_export.py", "test_faults.py")


@pytest.fixture(autouse=True)
def restored_environment():
    """What a test sets, such as RANK by pretrain.main, must not reach the processes of another."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


def config(folder: Path, tokenizer_dir: Path, paths: list[Path], **settings) -> PrepareConfig:
    """One source `s` of these files, prepared into folder/out."""
    source = SourceConfig("s", [str(path) for path in paths])
    return PrepareConfig([source], str(tokenizer_dir), output_dir=str(folder / "out"), **{"seq_len": 64, **settings})


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session")
def tales() -> list[str]:
    return [json.loads(line)["text"] for line in TALES.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, tales) -> Path:
    """A byte-level BPE of 384 tokens, trained on the tales, in the manner of GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(tales[:100], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


def tiny_config(family: str, vocabulary: int = VOCABULARY):
    from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

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
        "llama_tied": lambda: LlamaConfig(**grouped, tie_word_embeddings=True),
        "qwen3": lambda: Qwen3Config(**grouped, head_dim=16),
        "mistral": lambda: MistralConfig(**grouped, sliding_window=None),
        "gpt2": lambda: GPT2Config(
            vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=256, **special
        ),
    }[family]()  # fmt: skip


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory, tokenizer_dir):
    """`base_dir(family)`: a folder with a causal LM of random weights and the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
            with torch.no_grad():  # far from the initial near-uniform output, so that differences show
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(4)
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory, tokenizer_dir, tales) -> Path:
    """Two sources of tales, rows of 32 tokens, a tenth held out."""
    from data_prep.config import PrepareConfig, SourceConfig
    from data_prep.prepare import prepare

    folder = tmp_path_factory.mktemp("corpus")
    for name, part in (("short", tales[:60]), ("long", tales[300:320])):
        lines = "".join(json.dumps({"text": text[:1500]}) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    config = PrepareConfig(
        sources=[
            SourceConfig("short", [str(folder / "short.jsonl")], weight=3.0),
            SourceConfig("long", [str(folder / "long.jsonl")], weight=1.0),
        ],
        tokenizer=str(tokenizer_dir),
        seq_len=32,
        output_dir=str(folder / "shards"),
        validation_fraction=0.15,
        num_workers=1,
    )
    prepare(config, progress=False)
    return folder / "shards"


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def launch(
    ranks: int, arguments: list[str], cwd: Path = ROOT, launcher: str = "processes", timeout: int = 300
) -> subprocess.CompletedProcess:
    """Run a script on `ranks` CPU processes of one thread; returns its outcome.

    `launcher` is torchrun, deepspeed, or "processes": as srun starts them, without a launcher's own time.
    """
    binary = Path(sys.executable)
    if launcher == "processes":
        return _processes(ranks, arguments, cwd, timeout)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    if launcher == "deepspeed":
        command = [str(binary.with_name("deepspeed")), "--num_accelerators", str(ranks), "--master_port", _port()]
    else:
        command = [str(binary), "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", _port()]
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env=environment, timeout=timeout, text=True, capture_output=True, check=False
    )


def start(ranks: int, arguments: list[str], folder: Path, cwd: Path = ROOT) -> list[subprocess.Popen]:
    """One process a rank, as srun starts them; their output goes to folder/out.RANK and folder/err.RANK."""
    port, started = _port(), []
    common = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"TORCHDYNAMO_DISABLE": "1"}  # DeepSpeed would import the compiler, for a second, for an unused optimizer
    for rank in range(ranks):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(folder / f"out.{rank}", "wb") as out, open(folder / f"err.{rank}", "wb") as err:
            command = [sys.executable, *arguments]
            started.append(subprocess.Popen(command, cwd=cwd, env=environment, stdout=out, stderr=err))
    return started


def _processes(ranks: int, arguments: list[str], cwd: Path, timeout: int) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = start(ranks, arguments, folder, cwd)
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in started) and time.monotonic() < deadline:
            if any(process.returncode for process in started):  # one failed: the others may wait for it for ever
                deadline = min(deadline, time.monotonic() + 30)
            time.sleep(0.02)
        for process in started:
            process.kill()
            process.wait()
        out, err = (
            "".join((folder / f"{kind}.{rank}").read_text(errors="replace") for rank in range(ranks))
            for kind in ("out", "err")
        )
    code = next((process.returncode for process in started if process.returncode), 0)
    return subprocess.CompletedProcess(arguments, code, out, err)


def _port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, base_dir, corpus_dir):
    """`tiny_run(name, family, **overrides)`: arguments of pretrain/main.py for a run of seconds, and its folder."""
    root = tmp_path_factory.mktemp("runs")

    def arguments(name: str, family: str = "llama", stage: int = 3, **overrides) -> tuple[list[str], Path]:
        settings = {
            "run_dir": root / name,
            "model.base": base_dir(family),
            "model.dtype": "fp32",
            "data.path": corpus_dir,
            "annealing.steps": 4,
            "train.steps": 5,
            "train.global_batch_size": 8,
            "train.micro_batch_size": 2,
            "optimizer.lr": 1e-3,
            "optimizer.warmup_steps": 2,
            "checkpoint.every": 0,
            "validation.every": 0,
            "validation.rows": 6,
            "wandb.mode": "disabled",
            **overrides,
        }
        (root / "empty.yaml").write_text("{}\n")
        return [
            "pretrain/main.py",
            "--config",
            str(root / "empty.yaml"),
            "--deepspeed_config",
            f"ds_configs/zero{stage}.json",
            *(f"{key}={value}" for key, value in settings.items()),
        ], root / name

    return arguments
