"""Small real things for tests: a trained tokenizer, models of four families, a corpus, a run of seconds."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import TALES, VOCABULARY, tiny_config
from hub_server import hub  # noqa: F401, a fixture
from hypothesis import settings
from slurm_cluster import cluster  # noqa: F401, a fixture

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

# The same examples in every run, however slow the machine; a failure prints how to repeat it.
settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("fixed")

# Files that take longest begin first, so that both workers of `make test` end together.
SLOWEST = ("test_resume.py", "test_faults.py", "test_train.py", "test_training.py", "test_export.py", "test_guards.py")


@pytest.fixture(autouse=True)
def restored_environment():
    """What a test sets, such as RANK by pretrain.main, must not reach the processes of another."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


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
def tiny_checkpoint(base_dir, tmp_path_factory) -> Path:
    """A diffusion model as it is exported, of random weights and never trained."""
    from pretrain import adapt
    from pretrain.config import ModelConfig

    model = ModelConfig(base=str(base_dir("llama")))
    tokenizer = adapt.load_tokenizer(model)
    mask = adapt.add_mask_token(tokenizer, model)
    made = adapt.load_model(model, adapt.base_config(model, 32), mask, torch.float32)
    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
