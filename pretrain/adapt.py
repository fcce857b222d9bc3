"""From a causal language model to a diffusion model with a mask token, before any training.

In: the run configuration's model section. Out: a tokenizer that knows the mask, and the diffusion
class of the base's architecture with the base's weights.
"""

import ctypes
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AddedToken, AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from common.errors import UserError

from .config import ModelConfig
from .model import attention, loss
from .model.modeling_diffullama import diffusion_class

# Settings of known architectures under which head(hidden) are not the logits, or attention is not plain.
UNSUPPORTED = {
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "logit_scale": None,
    "logits_scaling": 1,
}


# What selective activation checkpointing keeps: the results that are dear to compute again.
SAVED = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def base_config(model: ModelConfig, seq_len: int) -> PretrainedConfig:
    """The base's configuration, checked. Raises UserError where it cannot be adapted at `seq_len`."""
    try:
        config = AutoConfig.from_pretrained(
            model.base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.base {model.base!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    for key, expected in model.architecture.items():
        if getattr(config, key, None) != expected:
            raise UserError(
                f"model.base {model.base!r} has {key}={getattr(config, key, None)!r}, "
                f"but model.architecture says {expected!r}; correct one of them"
            )
    check_adaptable(config, seq_len)
    return config


def check_adaptable(config: PretrainedConfig, seq_len: int) -> None:
    """Raise UserError for an architecture that would not compute what its causal original computes."""
    try:
        diffusion_class(type(config))
    except ValueError as error:
        raise UserError(f"model.base cannot be adapted: {error}") from None
    for key, harmless in UNSUPPORTED.items():
        if getattr(config, key, harmless) not in (harmless, None):
            raise UserError(f"model.base cannot be adapted: {key}={getattr(config, key)} is not supported")
    for key in ("max_position_embeddings", "n_positions", "sliding_window"):
        limit = getattr(config, key, None)
        if limit is not None and seq_len > limit:
            raise UserError(f"rows have {seq_len} tokens, but the base has {key}={limit}; prepare shorter rows")


def load_tokenizer(model: ModelConfig):
    """The base's tokenizer as it is, without a mask. Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(
            model.base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in model.base {model.base!r}: {str(error).splitlines()[0]}") from None


def add_mask_token(tokenizer, model: ModelConfig) -> int:
    """Give `tokenizer` its mask token and return the id. Raises UserError for an id outside the vocabulary."""
    if model.mask_token_id is None:
        # lstrip: the space before a mask belongs to the word to be found, as in RoBERTa's tokenizer
        tokenizer.add_special_tokens({"mask_token": AddedToken(model.mask_token, lstrip=True, special=True)})
        return tokenizer.mask_token_id
    if not 0 <= model.mask_token_id < len(tokenizer):
        raise UserError(f"model.mask_token_id is {model.mask_token_id}, the vocabulary has 0 to {len(tokenizer) - 1}")
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(model.mask_token_id)
    return model.mask_token_id


def load_model(model: ModelConfig, config: PretrainedConfig, mask_token_id: int, dtype: torch.dtype):
    """The diffusion model at step 0, partitioned while loading where ZeRO-3 is on.

    A new mask token gets the mean of the other embeddings; that of a diffusion checkpoint stays.
    Dropout is off: all randomness of a run is the noise, a function of (seed, sample).
    """
    for key in vars(config):
        if key.endswith("dropout") or key.endswith("_pdrop"):
            setattr(config, key, 0.0)
    vocabulary = config.vocab_size
    new = model.mask_token_id is None and getattr(config, "mask_token_id", None) != mask_token_id
    with freed_memory_returns():
        loaded = diffusion_class(type(config)).from_pretrained(
            model.base,
            config=config,
            revision=model.revision,
            dtype=dtype,
            use_safetensors=True,
        )
    loaded.config.use_cache = False
    loaded.config.mask_token_id = mask_token_id
    if mask_token_id >= vocabulary:
        loaded.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
    if new:
        heads = {id(m): m for m in (loaded.get_input_embeddings(), loaded.get_output_embeddings())}
        for module in heads.values():
            _set_row_to_mean(module, mask_token_id)
    loaded.attention_backend, loaded.loss_path = model.attention, model.loss
    accelerate_blocks(loaded, model)
    return loaded


@contextmanager
def freed_memory_returns() -> Iterator[None]:
    """Within it, memory of freed tensors goes back to the machine at once.

    Under ZeRO-3 a model is made and partitioned layer by layer, but glibc keeps the blocks that were freed and
    cannot reuse many of them: each rank then peaks at a full copy (benchmarks/host_memory.md).
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        yield
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt(mmap_threshold, 128 << 10)
    try:
        yield
    finally:  # what glibc itself arrives at in a process with large tensors
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 64 << 20)


def accelerate_blocks(loaded, model: ModelConfig) -> None:
    """Liger's kernels, activation checkpointing and torch.compile, as configured; the same model."""
    if model.liger:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        names = ("rope", "rms_norm", "swiglu", "geglu", "layer_norm")
        _apply_liger_kernel_to_instance(
            loaded, **dict.fromkeys(names, True), cross_entropy=False, fused_linear_cross_entropy=False
        )
    if model.activation_checkpointing != "none":
        settings: dict = {"use_reentrant": False}
        if model.activation_checkpointing == "selective":
            settings["context_fn"] = partial(create_selective_checkpoint_contexts, SAVED)
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    if model.compile:
        for block in blocks(loaded):
            block.compile(dynamic=False)


def blocks(loaded) -> torch.nn.ModuleList:
    """The transformer's blocks: the one list of as many modules as the configuration has layers."""
    layers = loaded.config.num_hidden_layers
    found = [m for m in loaded.base_model.children() if isinstance(m, torch.nn.ModuleList) and len(m) == layers]
    if len(found) != 1:
        raise UserError(f"model.compile does not find the blocks of {type(loaded.base_model).__name__}")
    return found[0]


def check_acceleration(model: ModelConfig, forms: set[str], device: str, dtype: torch.dtype) -> dict[str, str]:
    """The attention backend of each form of visibility. Raises UserError for what this machine cannot do."""
    try:
        loss.choose(model.loss, torch.device(device))
        found = {form: attention.choose(model.attention, form, device, dtype) for form in sorted(forms)}
    except ValueError as error:
        raise UserError(str(error)) from None
    if model.liger and (device != "cuda" or not importlib.util.find_spec("liger_kernel")):
        raise UserError("model.liger needs CUDA and the package liger-kernel: pip install liger-kernel")
    return found


@torch.no_grad()
def _set_row_to_mean(module: torch.nn.Module, row: int) -> None:
    """Row `row` of weight (and bias) becomes the mean of the rows before it."""
    parameters = list(module.parameters(recurse=False))
    if is_deepspeed_zero3_enabled():
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    else:
        gathered = nullcontext()
    with gathered:
        for parameter in parameters:
            if parameter.numel():  # under ZeRO-3 the change of rank 0 is what counts, and reaches all
                parameter[row] = parameter[:row].float().mean(0).to(parameter.dtype)
