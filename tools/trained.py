"""The fp32 weights of a run's checkpoint, of any ZeRO stage and number of ranks, read when they are needed.

DeepSpeed keeps the parameters that its optimizer updates in one flat tensor a group and rank:

- stages 1 and 2: a group's parameters stand one after the other, and the whole is cut into one piece a rank;
- stage 3: each parameter is cut into one piece a rank, and a rank's pieces stand one after the other.

The files are mapped, not read: what is in memory is the weight that is asked for. Not a verb.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from .weights import Weight


class JoinedWeight:
    """A weight whose pieces lie in several files."""

    def __init__(self, pieces: list[torch.Tensor], shape: torch.Size):
        self.pieces, self.shape = pieces, shape

    def contiguous(self) -> torch.Tensor:
        return torch.cat(self.pieces).view(self.shape)


def trained_weights(folder: Path, zero_stage: int) -> Mapping[str, Weight]:
    """The weights of a checkpoint folder by name; tied ones under each of their names.

    The files are pickles: only of runs that you trust. Raises ValueError where the pieces do not fill the weights.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # reading the pickles imports deepspeed, which would warn
    if zero_stage == 0:
        return _read(folder / "mp_rank_00_model_states.pt")["module"]
    model = _read(min(folder.glob("*_model_states.pt"), key=_rank))
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


def _of_stages_1_and_2(groups: list[dict], ranks: list[dict]) -> Iterator[tuple[str, JoinedWeight]]:
    paddings = ranks[0].get("param_alignment_paddings") or [None] * len(groups)
    for g, (shapes, padding) in enumerate(zip(groups, paddings, strict=True)):
        flat = [rank["single_partition_of_fp32_groups"][g] for rank in ranks]
        start = 0
        for i, (name, shape) in enumerate(shapes.items()):
            yield name, JoinedWeight(_stretch(flat, start, math.prod(shape)), torch.Size(shape))
            start += math.prod(shape) + (padding[i] if padding else 0)
        _check_used(start, flat, slack=2 * len(ranks))


def _of_stage_3(groups: list[dict], ranks: list[dict]) -> Iterator[tuple[str, JoinedWeight]]:
    start = 0
    for name, shape in (item for shapes in groups for item in shapes.items()):
        missing, share = math.prod(shape), math.ceil(math.prod(shape) / len(ranks))
        pieces = []
        for rank in ranks:  # the last shares may be padded
            pieces += _stretch(rank["fp32_flat_groups"], start, min(share, missing))
            missing -= min(share, missing)
        yield name, JoinedWeight(pieces, torch.Size(shape))
        start += share
    for rank in ranks:
        _check_used(start, rank["fp32_flat_groups"], slack=1)


def _stretch(flat: list[torch.Tensor], start: int, count: int) -> list[torch.Tensor]:
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
