"""Others' checkpoints on disk, and what is made of them."""

import json
from pathlib import Path

import pytest
from helpers import VOCABULARY
from others_models import Model, made_up

from tools.import_checkpoint import main


@pytest.fixture(scope="session")
def dream_tokenizer(tmp_path_factory, tokenizer_dir) -> Path:
    """As Dream ships it: vocab.json, merges.txt and a class of its own code, which must not run."""
    folder = tmp_path_factory.mktemp("dream_tokenizer")
    trained = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(trained["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in trained["merges"]))
    special = ("<|endoftext|>", "<|im_start|>", "<|beginoftext|>", "<|mask|>")
    settings = {
        "added_tokens_decoder": {
            str(VOCABULARY + i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                                  "single_word": False, "special": True}
            for i, token in enumerate(special)
        },
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "tokenizer_class": "DreamTokenizer", "bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>", "mask_token": "<|mask|>", "additional_special_tokens": list(special[1:]),
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_dream.py").write_text("raise SystemExit('remote code ran')\n")
    return folder


@pytest.fixture(scope="session")
def written(tmp_path_factory, tokenizer_dir, dream_tokenizer):
    """`written(kind)`: the made-up model and its folder."""
    made: dict[str, tuple[Model, Path]] = {}

    def write(kind: str) -> tuple[Model, Path]:
        if kind not in made:
            model = made_up(kind)
            words = dream_tokenizer if kind == "dream" else tokenizer_dir
            made[kind] = model, model.write(tmp_path_factory.mktemp("theirs") / kind, words)
        return made[kind]

    return write


@pytest.fixture(scope="session")
def imported(written, tmp_path_factory):
    """`imported(kind)`: the folder that the command makes of it."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            model, folder = written(kind)
            made[kind] = tmp_path_factory.mktemp("imported") / kind
            assert main([str(folder), str(made[kind]), *model.flags]) == 0
        return made[kind]

    return run
