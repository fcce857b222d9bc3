"""Computes attention for a `Visibility` with the fastest kernel that supports it.

In: a visibility, once a forward. Out: attention outputs of all layers, through the `AttentionInterface`
of transformers, so that no model code is copied or patched. The model's own mask is switched off.

    backend      forms                             runs on
    flash_attn   those with a flash_window         CUDA, half precision, with the package flash-attn
    varlen       those with a flash_window         CUDA, half precision, torch's own flash kernel
    flex         all                               CUDA
    sdpa         all, with dense masks             anywhere; the reference
"""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from .forms import Causal, Form, Full, numbers_of
from .visibility import Segments, Visibility, positions

IMPLEMENTATION = "diffullama"  # the name registered with transformers
BACKENDS = ("flash_attn", "varlen", "flex", "sdpa")  # the fastest first
FLASH = ("flash_attn", "varlen")
HALF = (torch.bfloat16, torch.float16)
DENSE_SHARE = 0.6  # documents are attended to one by one where they have less than this share of the dense pairs


def select_backend(requested: str, form: Form, device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that `model.attention` means for a form. Raises ValueError that names what can be used instead."""
    device = torch.device(device)
    possible = [name for name in BACKENDS if _obstacle(name, form, device, dtype) is None]
    if requested == "auto":
        # where no flash kernel runs, plain SDPA needs no compiling; a mask that changes every step wants flex
        return "sdpa" if possible[0] == "flex" and form.flash_window is not None else possible[0]
    if requested not in BACKENDS:
        raise ValueError(f"model.attention is {requested!r}, expected auto, {', '.join(BACKENDS)}")
    obstacle = _obstacle(requested, form, device, dtype)
    if obstacle:
        raise ValueError(f"model.attention={requested} {obstacle}; use {', '.join(possible)} here, or auto")
    return requested


def _obstacle(backend: str, form: Form, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot compute a form here; None where it can."""
    if backend == "sdpa":
        return None
    if backend in FLASH and form.flash_window is None:
        return f"cannot show the form {form.name!r}"
    if device.type != "cuda":
        return f"needs CUDA, not {device.type}"
    if backend == "flex":
        return None
    if dtype not in HALF:
        return f"needs bf16 or fp16, not {str(dtype).removeprefix('torch.')}"
    if backend == "flash_attn":
        return None if _flash_attn() else "needs the package flash-attn: pip install flash-attn"
    return None if importlib.util.find_spec("torch.nn.attention.varlen") else "needs torch 2.10 or newer"


@lru_cache
def _flash_attn():
    """(flash_attn_varlen_func, the value that means "unbounded") of the newest FlashAttention; None without any.

    4 (flash_attn.cute) from Blackwell on, since before it has no backward pass for varlen or windows;
    3 (flash_attn_interface); 2 (flash_attn).
    """
    packages: list[tuple[str, int | None]] = [("flash_attn_interface", -1), ("flash_attn", -1)]
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 10:
        packages.insert(0, ("flash_attn.cute", None))
    for package, unbounded in packages:
        try:
            return importlib.import_module(package).flash_attn_varlen_func, unbounded
        except (ImportError, AttributeError):
            continue
    return None


@dataclass(frozen=True)
class AttentionPlan:
    """A visibility made ready for one backend, once a forward, for all its layers."""

    backend: str
    causal: bool = False  # no mask is needed to be causal
    window: tuple[int, int] = (-1, -1)  # flash_attn and varlen: `window_size`
    segments: Segments | None = None  # flash_attn and varlen; sdpa where documents are taken one by one
    bounds: tuple[int, ...] = ()  # sdpa: cu_seqlens on the host
    mask: torch.Tensor | None = None  # sdpa: bool (1 or B, 1, L, L), or (longest, longest) for each document
    block_mask: object = None  # flex


def prepare_attention(
    visibility: Visibility, batch: int, length: int, device: torch.device, dtype: torch.dtype, requested: str = "auto"
) -> AttentionPlan:
    """What the selected backend needs. No tensor of L x L is made on the flash and flex paths."""
    visibility = visibility.simplified(length)
    form, documents = visibility.form, visibility.documents
    causal = isinstance(form, Causal)
    backend = select_backend(requested, form, device, dtype)
    if backend in FLASH:
        window = form.flash_window or (-1, -1)
        return AttentionPlan(backend, causal, window, Segments.of(visibility, batch, length, device))
    if backend == "flex":
        return AttentionPlan(backend, block_mask=_block_mask(visibility, batch, length, device))
    if documents is None:
        return AttentionPlan(backend, causal, mask=None if causal else visibility.dense(length, device))
    if device.type == "cpu":
        segments = Segments.of(visibility, batch, length, device)
        if float(segments.cu_seqlens.diff().double().square().sum()) < DENSE_SHARE * batch * length**2:
            mask = None if causal else Visibility(form).dense(segments.max_seqlen, device)
            mask = None if mask is None else mask[0, 0]
            return AttentionPlan(
                backend, causal, segments=segments, bounds=tuple(segments.cu_seqlens.tolist()), mask=mask
            )
    return AttentionPlan(backend, mask=visibility.dense(length, device))


def plan_for_window(attention_mask: torch.Tensor | None) -> AttentionPlan:
    """Some positions of a bidirectional row attend to all of it, padding (B, L) apart: more keys than queries."""
    if attention_mask is None or bool(attention_mask.all()):
        return AttentionPlan("sdpa")
    return AttentionPlan("sdpa", mask=attention_mask.bool()[:, None, None, :])


def _block_mask(visibility: Visibility, batch: int | None, length: int, device: torch.device) -> object:
    """FlexAttention's mask. Numbers that change from step to step are tensors, so that compiled kernels are reused."""
    from torch.nn.attention.flex_attention import create_block_mask

    documents = visibility.documents
    if isinstance(visibility.form, Full) and documents is None:
        return None
    shows = visibility.form.mask_mod
    numbers = [torch.tensor(number, device=device) for number in numbers_of(visibility.form)]
    if documents is None:

        def mask_mod(b, h, i, j):
            return shows(i, j, *numbers)

        batch = None
    else:
        position = positions(documents)

        def mask_mod(b, h, i, j):
            same = documents[b, i] == documents[b, j]
            return same & shows(position[b, i], position[b, j], *numbers)

    compiled = device.type == "cuda"  # otherwise a dense mask is made on the way, for tests
    return create_block_mask(mask_mod, batch, None, length, length, device=device, _compile=compiled)


@lru_cache
def _flex(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # (B, heads, L, head_dim)
    key: torch.Tensor,  # (B, key_value_heads, L or more, head_dim)
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    attention_plan: AttentionPlan | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """The signature of transformers' attention functions; returns (B, L, heads, head_dim)."""
    if attention_plan is None:
        raise ValueError("attention was called without a visibility; call the DiffusionModel, not a part of it")
    if sliding_window is not None and key.shape[2] > sliding_window:
        raise ValueError(
            f"rows of {key.shape[2]} tokens, but this model attends within {sliding_window}; use a shorter seq_len"
        )
    if kwargs.get("softcap") is not None:
        raise ValueError("this model caps its attention scores (softcap), which this project does not do")
    if dropout:
        raise ValueError(f"attention dropout is {dropout}; all randomness of a diffusion model's training is its noise")
    backend = {"flash_attn": _by_flash_attn, "varlen": _by_varlen, "flex": _by_flex, "sdpa": _by_sdpa}
    return backend[attention_plan.backend](query, key, value, scaling, attention_plan), None


def _flat(x: torch.Tensor) -> torch.Tensor:
    """(B, heads, L, head_dim) to (B·L, heads, head_dim), the layout of varlen kernels."""
    return x.transpose(1, 2).flatten(0, 1)


def _by_flash_attn(query, key, value, scaling, made: AttentionPlan) -> torch.Tensor:
    s: Any = made.segments
    kernel, unbounded = _flash_attn()  # type: ignore[misc]
    output = kernel(
        _flat(query),
        _flat(key),
        _flat(value),
        cu_seqlens_q=s.cu_seqlens,
        cu_seqlens_k=s.cu_seqlens,
        max_seqlen_q=s.max_seqlen,
        max_seqlen_k=s.max_seqlen,
        softmax_scale=scaling,
        causal=made.causal,
        window_size=tuple(unbounded if made.causal or side < 0 else side for side in made.window),
    )
    output = output[0] if isinstance(output, tuple) else output  # 3 and 4 may give the lse too
    return output.unflatten(0, (query.shape[0], query.shape[2]))


def _by_varlen(query, key, value, scaling, made: AttentionPlan) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    s: Any = made.segments
    output: Any = varlen_attn(
        _flat(query),
        _flat(key),
        _flat(value),
        s.cu_seqlens,
        s.cu_seqlens,
        s.max_seqlen,
        s.max_seqlen,
        scale=scaling,
        window_size=made.window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.unflatten(0, (query.shape[0], query.shape[2]))


def _by_flex(query, key, value, scaling, made: AttentionPlan) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    flex: Any = _flex(query.is_cuda)
    output = flex(query, key, value, block_mask=made.block_mask, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2).contiguous()


def _by_sdpa(query, key, value, scaling, made: AttentionPlan) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and made.mask is not None:
        # with a mask, CUDA's fused kernels take no grouped keys, and the unfused one needs B x heads x L x L floats
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        grouped = False
    if made.bounds:
        return _by_document(query, key, value, scaling, made, grouped)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=made.mask, is_causal=made.causal, scale=scaling, enable_gqa=grouped
    )
    return output.transpose(1, 2).contiguous()


def _by_document(query, key, value, scaling, made: AttentionPlan, grouped: bool) -> torch.Tensor:
    """Each document alone: on a CPU the pairs that a dense mask hides cost as much as those that it shows."""
    batch, _, length, _ = query.shape
    rows = [x.transpose(0, 1).flatten(1, 2) for x in (query, key, value)]  # (heads, B·L, head_dim)
    sizes = [stop - start for start, stop in zip(made.bounds, made.bounds[1:])]
    parts = [x.split(sizes, dim=1) for x in rows]
    outputs = []
    for q, k, v in zip(*parts):
        size = q.shape[1]
        output = F.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=None if made.mask is None else made.mask[:size, :size],
            is_causal=made.causal,
            scale=scaling,
            enable_gqa=grouped,
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs).unflatten(0, (batch, length))


def _no_mask(*args: object, **kwargs: object) -> None:
    """The model makes no mask of its own; the visibility decides."""


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
