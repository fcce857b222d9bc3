"""How far does a batch walk from the disk to its loss, and how deep is the training step below `main`?

    python benchmarks/walk.py [key=value ...]        # overrides of the run, such as annealing.form=bernoulli

One step of a tiny model is trained through pretrain/main.py, watched by Python's profiler. Counted is every function
of the product that is given or returns an array or tensor, from the first row read to the loss of the first forward
pass: directly, or inside lists, tuples, dicts and dataclasses. Lambdas, comprehensions and generated methods do not
count, nor does what an object holds that is none of these. Exits with 1 where a limit is passed.

The limits are for bidirectional attention, where only tokens walk. A form that needs a mask, and isolated documents,
add the functions that build the mask: annealing.form=bernoulli or data.isolate_documents=true show which.
"""

import json
import os
import runpy
import sys
import tempfile
import threading
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import CodeType, FrameType

if not __package__:  # run as a file: find the project
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from benchmarks.inputs import llama, prepare_shards, read_texts, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("common", "data_prep", "pretrain", "tools")
MOST_CALLS = 2  # from main to the training step
MOST_FUNCTIONS, MOST_FILES = 12, 6  # from the disk to the loss
TALES, VOCABULARY, LENGTH = 60, 384, 32


@dataclass
class Walk:
    """What was seen; each function as `name (file)`."""

    functions: list[str] = field(default_factory=list)  # in the order in which they first hold a batch's arrays
    chain: list[str] = field(default_factory=list)  # from main to the training step, both included

    @property
    def files(self) -> list[str]:
        """The functions' files, each once."""
        return list(dict.fromkeys(name.partition(" (")[2].rstrip(")") for name in self.functions))

    @property
    def calls(self) -> int:
        """Calls of ours from main to the training step."""
        return len(self.chain) - 1

    def __str__(self) -> str:
        lines = [f"main to the training step, {self.calls} calls (at most {MOST_CALLS}): {' > '.join(self.chain)}"]
        lines.append(
            f"disk to loss, {len(self.functions)} functions (at most {MOST_FUNCTIONS}) "
            f"in {len(self.files)} files (at most {MOST_FILES}):"
        )
        lines += [f"{number:4} {name}" for number, name in enumerate(self.functions, 1)]
        return "\n".join(lines)


def holds_arrays(value: object, depth: int = 4) -> bool:
    """Whether a value is an array or tensor, or a list, tuple, dict or dataclass that holds one."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return True
    if depth == 0 or isinstance(value, type):
        return False
    if isinstance(value, list | tuple):
        return any(holds_arrays(item, depth - 1) for item in value)
    if isinstance(value, dict):
        return any(holds_arrays(item, depth - 1) for item in value.values())
    return is_dataclass(value) and any(holds_arrays(getattr(value, f.name, None), depth - 1) for f in fields(value))


def title(code: CodeType) -> str | None:
    """`name (file)` of a function of the product that somebody wrote; None for any other code."""
    path = Path(code.co_filename)
    if code.co_name.startswith("<") or not path.is_relative_to(ROOT):
        return None
    file = path.relative_to(ROOT)
    return f"{code.co_qualname} ({file})" if file.parts[0] in PRODUCT else None


class Watcher:
    """The profile function of all threads: fills a `Walk`."""

    def __init__(self) -> None:
        self.walk = Walk()
        self.reading = self.ended = False
        self.titles: dict[CodeType, str | None] = {}

    def __call__(self, frame: FrameType, event: str, result: object) -> None:
        if self.ended or event not in ("call", "return"):
            return
        code = frame.f_code
        if code not in self.titles:
            self.titles[code] = title(code)
        name = self.titles[code]
        if name is None:
            return
        if event == "call":
            if name == "train_step (pretrain/step.py)" and not self.walk.chain:
                self.walk.chain = chain_to(frame)
            count = code.co_argcount + code.co_kwonlyargcount
            count += bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)  # *args, **kwargs
            held = self.reading and holds_arrays([frame.f_locals.get(v) for v in code.co_varnames[:count]])
        else:
            held = holds_arrays(result)
            self.reading |= held and name.endswith("(data_prep/shards.py)")  # the first row
            held &= self.reading
        if held and name not in self.walk.functions:
            self.walk.functions.append(name)
        self.ended = event == "return" and name == "DiffusionModel.forward (pretrain/model/modeling_diffullama.py)"


def chain_to(frame: FrameType | None) -> list[str]:
    """The product's functions from `main` of pretrain/main.py to a frame, both included."""
    chain: list[str] = []
    while frame is not None:
        name = title(frame.f_code)
        if name:
            chain.insert(0, name)
        if name == "main (pretrain/main.py)":
            break
        frame = frame.f_back
    return chain


def make_inputs(folder: Path) -> list[str]:
    """A corpus and a configuration of one step; returns the arguments of pretrain/main.py."""
    texts = read_texts([str(ROOT / "data_prep" / "demo" / "tales.jsonl")])[:TALES]
    train_tokenizer(texts, VOCABULARY, folder / "tokenizer")
    (folder / "tales.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    prepare_shards([str(folder / "tales.jsonl")], folder / "tokenizer", LENGTH, 0.0, folder / "shards")
    config = {
        "run_dir": str(folder / "run"),
        "model": {
            "base": str(folder / "tokenizer"),
            "init": "random",
            "dtype": "fp32",
            "architecture": llama(32, 64, 2, 4, VOCABULARY, LENGTH),
        },
        "data": {"path": str(folder / "shards")},
        "annealing": {"form": "none"},
        "train": {"steps": 1, "global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"warmup_steps": 0},
        "checkpoint": {"keep": 0},
        "validation": {"rows": 0},  # a validation would be the first forward pass
        "guards": {"stall_minutes": 0},
        "wandb": {"mode": "disabled"},
    }
    (folder / "run.yaml").write_text(json.dumps(config), encoding="utf-8")  # YAML includes JSON
    return ["--config", str(folder / "run.yaml"), "--deepspeed_config", str(ROOT / "ds_configs" / "zero0.json")]


def watch(folder: Path, overrides: list[str] | None = None) -> Walk:
    """Train one step in `folder` and say where its first batch went. Leaves DeepSpeed initialised in this process."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    arguments = [*make_inputs(folder), *(overrides or [])]
    before = sys.argv
    sys.argv = ["pretrain/main.py", *arguments]
    watcher = Watcher()
    threading.setprofile(watcher)
    sys.setprofile(watcher)
    code: object = None
    try:
        runpy.run_module("pretrain.main", run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = before
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    if code or not watcher.ended:
        raise RuntimeError(f"the step was not trained: pretrain/main.py returned {code}")
    return watcher.walk


def main() -> int:
    """Print the walk; 1 where it is longer than it may be."""
    with tempfile.TemporaryDirectory() as folder:
        walk = watch(Path(folder), sys.argv[1:])
    print(walk)
    longer = walk.calls > MOST_CALLS or len(walk.functions) > MOST_FUNCTIONS or len(walk.files) > MOST_FILES
    return int(longer)


if __name__ == "__main__":
    sys.exit(main())
