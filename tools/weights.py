"""Weights that are read when they are needed, and written in files of a limited size. Not a verb."""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from huggingface_hub.constants import SAFETENSORS_WEIGHTS_FILE_PATTERN
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from common.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SHARD_SIZE = "4GB"
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PATTERNS = ("*.safetensors", "*model*.bin", "*model*.pt")  # of weights; transformers also writes training_args.bin


class Weight(Protocol):
    """A tensor, or what is read from disk when `contiguous` is called."""

    @property
    def shape(self) -> torch.Size: ...

    def contiguous(self) -> torch.Tensor: ...


def matched_weights(weights: Mapping[str, Weight], model: PreTrainedModel) -> dict[str, Weight]:
    """The weight of each of the model's names; a weight that is tied to another is left out.

    Raises UserError for a missing name or another shape.
    """
    tied = model.all_tied_weights_keys
    aliases = {source: name for name, source in tied.items()}
    found = {}
    for name, expected in model.state_dict().items():
        if name in tied:
            continue
        weight = weights.get(name, weights.get(aliases.get(name, "")))
        if weight is None:
            raise UserError(f"the weights do not fit the configuration: {name} is missing")
        if weight.shape != expected.shape:
            shapes = f"{tuple(weight.shape)}, expected {tuple(expected.shape)}"
            raise UserError(f"the weights do not fit the configuration: {name} has shape {shapes}")
        found[name] = weight
    return found


@dataclass(frozen=True)
class FirstRows:
    """The first `rows` rows of a weight."""

    weight: Weight
    rows: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self.rows, *self.weight.shape[1:]])

    def contiguous(self) -> torch.Tensor:
        return self.weight.contiguous()[: self.rows].contiguous()


def first_rows(weights: Mapping[str, Weight], model: PreTrainedModel) -> dict[str, Weight]:
    """The weights, those of which `model` has fewer rows cut to these: a vocabulary without its last tokens."""
    expected = {name: parameter.shape for name, parameter in model.state_dict().items()}

    cut: dict[str, Weight] = dict(weights)
    for name, shape in expected.items():
        if name in cut and cut[name].shape[1:] == shape[1:] and cut[name].shape[0] > shape[0]:
            cut[name] = FirstRows(cut[name], shape[0])
    return cut


def check_tensors(weights: Mapping[str, Weight], model: PreTrainedModel, where: Path) -> None:
    """Raise UserError unless `weights` are those of the model: none missing, unexpected or of another shape.

    Of two that are tied, one may be there, or both with the same values.
    """
    tied = model.all_tied_weights_keys
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    present = {*weights, *(tied[name] for name in tied if name in weights)}
    wrong = {
        "missing": sorted(name for name in expected if name not in present and name not in tied),
        "unexpected": sorted(name for name in weights if name not in expected),
        "of another shape": sorted(n for n, w in weights.items() if n in expected and w.shape != expected[n]),
    }
    if any(wrong.values()):
        listed = "; ".join(f"{len(names)} {kind}, first {names[0]}" for kind, names in wrong.items() if names)
        shapes = ""
        if wrong["of another shape"]:
            first = wrong["of another shape"][0]
            shapes = f" {tuple(weights[first].shape)}, expected {tuple(expected[first])}"
        raise UserError(
            f"{where}: the tensors do not fit config.json: {listed}{shapes}; is the download complete, and is it the "
            "layout that you mean (--layout)?"
        )
    for name, source in tied.items():
        if name in weights and source in weights:
            same = torch.equal(weights[name].contiguous(), weights[source].contiguous())
            if not same:
                raise UserError(f"{where}: {name} differs from {source}, but the model shares one for both (tied)")


def split_into_files(weights: Mapping[str, Weight], dtype: torch.dtype, max_shard_size: str) -> StateDictSplit:
    """Which weights go into which file, nothing read. Raises UserError for a `max_shard_size` that is not a size."""
    try:
        if re.match(r"\s*(-|0*\.?0*[a-zA-Z])", max_shard_size):  # below or equal 0
            raise ValueError
        return split_state_dict_into_shards_factory(
            dict(weights),
            get_storage_size=lambda weight: weight.shape.numel() * dtype.itemsize,
            filename_pattern=SAFETENSORS_WEIGHTS_FILE_PATTERN,
            max_shard_size=max_shard_size,
        )
    except ValueError:
        raise UserError(f"--max_shard_size is {max_shard_size!r}, expected a number and a unit, such as 4GB") from None


def save_weights(weights: Mapping[str, Weight], split: StateDictSplit, dtype: torch.dtype, folder: Path) -> None:
    """Write safetensors as transformers does, with one file at a time in memory."""
    files = split.filename_to_tensors.items()
    for file, names in tqdm(files, desc="write", unit="file", disable=not split.is_sharded):
        tensors = {name: weights[name].contiguous().to(dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors  # else they would stay while the next file's are read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def empty_model(config: PretrainedConfig, dtype: torch.dtype, model_class: Any) -> PreTrainedModel:
    """The model without storage: its parameters' names, shapes, sizes and ties."""
    with torch.device("meta"):
        return model_class(config).to(dtype)


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a safetensors file; `dtype` is None where the file holds no floats of 16 to 64 bits."""

    path: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype | None

    def contiguous(self) -> torch.Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.name)


def stored_weights(folder: Path) -> dict[str, Any]:
    """The weights of a folder by name, none of them read: its safetensors, or without any its *.bin or *.pt.

    Each weight has `shape`, `dtype` and `contiguous()`. Pickles are opened with weights_only=True: no code in them
    runs. Raises UserError for a folder without weights, a missing shard and a pickle that holds something else.
    """
    files = _weight_files(folder)
    return _in_safetensors(files) if files[0].suffix == ".safetensors" else _in_pickles(files)


def _weight_files(folder: Path) -> list[Path]:
    """The files of the first pattern that matches; those that their index lists, where there is one."""
    for pattern in PATTERNS:
        suffix = pattern.rpartition("*")[2]
        files = sorted(folder.glob(pattern))
        for index in sorted(folder.glob(f"*{suffix}.index.json")):
            try:
                listed = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f"{index} is no index of weights; download it again") from None
            missing = [name for name in listed if not (folder / name).is_file()]
            if missing:
                raise UserError(f"{folder}: {index.name} lists {missing[0]}, which is not there; download it again")
            files = [folder / name for name in listed]
        if files:
            return files
    raise UserError(f"{folder} holds no weights; expected one of {', '.join(PATTERNS)}")


def _in_safetensors(files: list[Path]) -> dict[str, StoredWeight]:
    found: dict[str, StoredWeight] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118, it is no mapping
                    part = file.get_slice(name)
                    _check_new(name, found, path)
                    dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                    found[name] = StoredWeight(path, name, torch.Size(part.get_shape()), dtype)
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read: {error}; download it again") from None
    return found


def _in_pickles(files: list[Path]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in files:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is no dictionary of tensors that can be mapped: {reason}") from None
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise UserError(f"{path} holds something else than a dictionary of tensors; expected a state dict")
        for name, tensor in content.items():
            _check_new(name, found, path)
            found[name] = tensor
    return found


def _check_new(name: str, found: Mapping[str, Any], path: Path) -> None:
    if name in found:
        raise UserError(f"{path.parent}: {name} is in two weights files; delete those that are not of this model")


def chosen_dtype(weights: Mapping[str, Any], asked: str, where: Path) -> torch.dtype:
    """`asked`, or for "auto" bf16 where every weight is, else fp32, which holds fp16 exactly. Raises UserError."""
    strange = sorted(name for name, weight in weights.items() if weight.dtype not in SAFETENSORS_DTYPES.values())
    if strange:
        raise UserError(
            f"{where}: {len(strange)} weights are no floats of 16 to 64 bits, first {strange[0]}; is it quantised?"
        )
    if asked != "auto":
        return DTYPES[asked]
    return torch.bfloat16 if all(w.dtype == torch.bfloat16 for w in weights.values()) else torch.float32
