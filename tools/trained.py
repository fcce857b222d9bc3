"""The fp32 weights of a run's checkpoint, of any ZeRO stage and number of ranks, read when they are needed.

DeepSpeed keeps the parameters that its optimizer updates in one flat tensor a group and rank:

- stages 1 and 2: the group's parameters are joined, and the result is cut into one piece a rank;
- stage 3: each parameter is cut into one piece a rank, and each rank joins its pieces.

Stage 0 has whole weights, and beside bf16 ones the optimizer's copies in fp32.

The files are mapped, not read: what is in memory is the weight that is asked for. Not a verb.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from common.errors import UserError

from .weights import Weight


class JoinedWeight:
    """A weight whose pieces lie in several files."""

    def __init__(self, pieces: list[torch.Tensor], shape: torch.Size):
        self.pieces, self.shape = pieces, shape

    def contiguous(self) -> torch.Tensor:
        return torch.cat(self.pieces).view(self.shape)


def trained_weights(folder: Path, zero_stage: int) -> Mapping[str, Weight]:
    """The weights of a checkpoint folder by name; tied ones under each of their names.

    The files are pickles: only of runs that you trust. Raises UserError for a folder without files, and ValueError
    where the pieces do not fill the weights.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # reading the pickles imports deepspeed, which would warn
    found = sorted(folder.glob("*_model_states.pt"), key=_rank)
    if not found:
        raise UserError(f"{folder} holds no model; training may have deleted it meanwhile: export another step")
    model = _read(found[0])
    if zero_stage == 0:
        return _of_stage_0(model)
    ranks = [_read(path)["optimizer_state_dict"] for path in sorted(folder.glob("*_optim_states.pt"), key=_rank)]
    joined = _of_stage_3 if zero_stage == 3 else _of_stages_1_and_2
    weights: dict[str, Weight] = dict(joined(model["param_shapes"], ranks))
    for name, source in model["shared_params"].items():
        weights[name] = weights[source]
    return weights


def _read(path: Path) -> dict:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _rank(path: Path) -> int:
    """The data parallel rank in the name of a file of DeepSpeed's; 0 where all ranks share one."""
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(found[1]) if found else 0


def _of_stage_0(model: dict) -> dict[str, torch.Tensor]:
    """The optimizer's fp32 copies, where training computed in bf16; they stand group by group in the model's order."""
    weights = dict(model["module"])
    first: dict[int, str] = {}  # of each tensor: tied weights are one tensor under several names
    for name, weight in weights.items():
        first.setdefault(weight.data_ptr(), name)
    names = [name for name in first.values() if name not in (model["buffer_names"] or [])]
    whole = {}
    for group in (model["optimizer"] or {}).get("fp32_groups", []):
        # pretrain.optimization.parameter_groups: matrices decay, vectors do not
        of_group = [name for name in names if (weights[name].ndim > 1) == (group[0].ndim > 1)]
        for name, copy in zip(of_group, group, strict=True):
            if copy.shape != weights[name].shape:
                raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, its fp32 copy {tuple(copy.shape)}")
            whole[name] = copy
    return {name: whole.get(first[weight.data_ptr()], weight) for name, weight in weights.items()}


def _of_stages_1_and_2(groups: list[dict], ranks: list[dict]) -> Iterator[tuple[str, JoinedWeight]]:
    paddings = ranks[0].get("param_alignment_paddings") or [None] * len(groups)
    for g, (shapes, padding) in enumerate(zip(groups, paddings, strict=True)):
        flat = [rank["single_partition_of_fp32_groups"][g] for rank in ranks]
        start = 0
        for i, (name, shape) in enumerate(shapes.items()):
            yield name, JoinedWeight(_slices_of(flat, start, math.prod(shape)), torch.Size(shape))
            start += math.prod(shape) + (padding[i] if padding else 0)
        _check_used(start, flat, slack=2 * len(ranks))


def _of_stage_3(groups: list[dict], ranks: list[dict]) -> Iterator[tuple[str, JoinedWeight]]:
    start = 0
    for name, shape in (item for shapes in groups for item in shapes.items()):
        missing, share = math.prod(shape), math.ceil(math.prod(shape) / len(ranks))
        pieces = []
        for rank in ranks:  # the last shares may be padded
            pieces += _slices_of(rank["fp32_flat_groups"], start, min(share, missing))
            missing -= min(share, missing)
        yield name, JoinedWeight(pieces, torch.Size(shape))
        start += share
    for rank in ranks:
        _check_used(start, rank["fp32_flat_groups"], slack=1)


def _slices_of(flat: list[torch.Tensor], start: int, count: int) -> list[torch.Tensor]:
    """Views of the `count` elements from `start` of what `flat` tensors are one after the other."""
    pieces = []
    for tensor in flat:
        end = min(start + count, len(tensor))
        if start < end:
            pieces.append(tensor[start:end])
            count -= end - start
        start = max(0, start - len(tensor))
    if count:
        raise ValueError(f"{count} elements of a weight are missing")
    return pieces


def _check_used(used: int, flat: list[torch.Tensor], slack: int) -> None:
    """Raise ValueError where the flat tensors hold other weights than were read; DeepSpeed pads by under `slack`."""
    held = sum(len(tensor) for tensor in flat)
    if not 0 <= held - used < slack:
        raise ValueError(f"the checkpoint holds {held} elements, and its weights take {used}")
