"""A LoRA adapter in peft's layout, merged into the weights of its base while these are read. Not a verb.

    weights = merge(base_weights, adapter_weights, adapter_config, rename)

Each weight that the adapter names becomes W + scale · B A, computed in fp32 when it is asked for, one at a time.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from common.errors import UserError

from .weights import Weight

PREFIX = "base_model.model."
# Settings of adapter_config.json under which the merged weight would be another one.
UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias",
    "alora_invocation_tokens", "trainable_token_indices", "target_parameters",
)  # fmt: skip
# Ways to begin that leave the base's weights as they are; others, such as pissa and loftq, also change those.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class MergedWeight:
    """W + scale · B A; its transpose where W is (in, out), as in GPT-2's Conv1D."""

    base: Weight
    a: Weight  # (r, in)
    b: Weight  # (out, r)
    scale: float
    transposed: bool

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype | None:
        return getattr(self.base, "dtype", None)

    def contiguous(self) -> torch.Tensor:
        """In fp32: who writes it rounds once."""
        update = self.b.contiguous().float() @ self.a.contiguous().float()
        return self.base.contiguous().float() + self.scale * (update.T if self.transposed else update)


@dataclass(frozen=True)
class Merge:
    """The weights of the base after the merge, and the names of those that the adapter changed."""

    weights: dict[str, Weight]
    updated: list[str]  # W + scale · B A
    replaced: list[str]  # modules_to_save


def merge(
    base: Mapping[str, Weight],
    adapter: Mapping[str, Weight],
    settings: Mapping[str, Any],
    rename: Callable[[str], str] = str,
    transposed: bool = False,
) -> Merge:
    """Merge an adapter's tensors under the `settings` of its adapter_config.json into the weights of `base`.

    `rename` turns a name of the model that peft wrapped into one of `base`; `transposed`: its weights are (in, out), as
    in GPT-2's Conv1D. Raises UserError for an adapter that is
    not LoRA alone, and for tensors that the base has no place for.
    """
    check_settings(settings)
    if bool(settings.get("fan_in_fan_out", transposed)) != transposed:
        raise UserError(
            f"adapter_config.json has fan_in_fan_out={settings['fan_in_fan_out']}, expected {transposed} for this base"
        )
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank
    pairs, saved, unknown = sort_tensors(adapter, rename)
    unknown += sorted(name for name in [*pairs, *saved] if name not in base)
    if unknown:
        raise UserError(f"the adapter has {len(unknown)} tensors that the base has no place for, first {unknown[0]}")
    if not pairs and not saved:
        raise UserError("the adapter holds no tensors; download it again")
    merged = dict(base)
    for name, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise UserError(f"the adapter has only lora_{''.join(pair)} for {name}; download it again")
        shape = base[name].shape[::-1] if transposed else base[name].shape  # (out, in)
        expected = (rank, *shape[1:]), (*shape[:1], rank)
        found = tuple(pair["A"].shape), tuple(pair["B"].shape)
        if found != expected:
            raise UserError(
                f"the adapter's A and B for {name} have shapes {found[0]} and {found[1]}, expected {expected[0]} and "
                f"{expected[1]}; is it of another base?"
            )
        merged[name] = MergedWeight(base[name], pair["A"], pair["B"], scale, transposed)
    for name, weight in saved.items():
        if weight.shape != base[name].shape:
            raise UserError(
                f"the adapter replaces {name} by one of shape {tuple(weight.shape)}, expected "
                f"{tuple(base[name].shape)}; is it of another base?"
            )
        merged[name] = weight
    return Merge(merged, sorted(pairs), sorted(saved))


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise UserError for an adapter_config.json that asks for more than W + scale · B A."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UserError(f"adapter_config.json has peft_type {kind!r}, expected LORA")
    for key in ("r", "lora_alpha"):
        value = settings.get(key)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"adapter_config.json has {key}={settings.get(key)!r}, expected a number above 0")
    wrong = [key for key in UNSUPPORTED if settings.get(key)]
    if settings.get("bias", "none") != "none":
        wrong.append("bias")
    beginning = settings.get("init_lora_weights")
    if beginning not in INITIALISATIONS:
        wrong.append("init_lora_weights")
    if wrong:
        found = ", ".join(f"{key}={settings[key]!r}" for key in wrong)
        raise UserError(
            f"adapter_config.json has {found}, which cannot be merged here; merge with peft's merge_and_unload(), "
            "save_pretrained(), and import that folder"
        )


def sort_tensors(
    adapter: Mapping[str, Weight], rename: Callable[[str], str]
) -> tuple[dict[str, dict[str, Weight]], dict[str, Weight], list[str]]:
    """Of an adapter's tensors, by the base's names: A and B, whole weights, and the names that are not understood."""
    pairs: dict[str, dict[str, Weight]] = {}
    saved: dict[str, Weight] = {}
    unknown = []
    for full, weight in adapter.items():
        name = full.removeprefix(PREFIX)
        module, _, rest = name.partition(".lora_")
        if name == full:
            unknown.append(full)
        elif rest in ("A.weight", "B.weight", "A.default.weight", "B.default.weight"):
            pair = pairs.setdefault(rename(f"{module}.weight"), {})
            if rest[0] in pair:
                raise UserError(f"the adapter has lora_{rest[0]} for {module} twice; download it again")
            pair[rest[0]] = weight
        elif rest:
            unknown.append(full)
        else:
            saved[rename(name.replace(".modules_to_save.default.", "."))] = weight
    return pairs, saved, sorted(unknown)
