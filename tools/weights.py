"""Weights that are read when they are needed, and written in files of a limited size. Not a verb."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from huggingface_hub.constants import SAFETENSORS_WEIGHTS_FILE_PATTERN
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from common.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SHARD_SIZE = "4GB"


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


def split_into_files(weights: Mapping[str, Weight], dtype: torch.dtype, max_shard_size: str) -> StateDictSplit:
    """Which weights go into which file, nothing read. Raises UserError for a `max_shard_size` that is not a size."""
    try:
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
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def empty_model(config: PretrainedConfig, dtype: torch.dtype, model_class: Any) -> PreTrainedModel:
    """The model without storage: its parameters' names, shapes, sizes and ties."""
    with torch.device("meta"):
        return model_class(config).to(dtype)


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a safetensors file."""

    path: Path
    name: str
    shape: torch.Size

    def contiguous(self) -> torch.Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.name)


def stored_weights(folder: Path) -> dict[str, StoredWeight]:
    """The weights of a folder's safetensors by name, none of them read. Raises UserError where there are none."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                found[name] = StoredWeight(path, name, torch.Size(file.get_slice(name).get_shape()))
    if not found:
        raise UserError(f"{folder} holds no safetensors")
    return found
