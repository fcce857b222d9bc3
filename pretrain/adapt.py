"""From a causal language model to a model that can be trained: with a mask token, and attention of any form.

In: the run configuration's model section. Out: a tokenizer that knows the mask, and the diffusion
class of the base's architecture with the base's weights, or with new ones.
"""

import ctypes
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AddedToken, AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from common.errors import UserError, without_passwords

from .config import ModelConfig, RunConfig
from .model.attention import IMPLEMENTATION, select_backend
from .model.forms import Form
from .model.loss import select_loss
from .model.modeling_diffullama import diffusion_class

# Settings of known architectures under which head(hidden) are not the logits, or attention is not softmax alone.
# Each with the value that does no harm.
UNSUPPORTED = {
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "logit_scale": None,
    "logits_scaling": 1,
}


# What selective activation checkpointing keeps: ops too expensive to recompute.
SAVED = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def base_config(model: ModelConfig, seq_len: int) -> PretrainedConfig:
    """The shape of the model to train, checked. Raises UserError where it cannot be trained at `seq_len`.

    With model.init=random it is model.architecture where given; otherwise the base's, which model.architecture must
    agree with.
    """
    if model.init == "random" and model.architecture:
        config = architecture_config(model.architecture)
    else:
        config = _load_base_config(model)
        for key, expected in (model.architecture or {}).items():
            if getattr(config, key, None) != expected:
                raise UserError(
                    f"model.base {model.base!r} has {key}={getattr(config, key, None)!r}, but model.architecture says "
                    f"{expected!r}; correct one of them, or take the base's own shape with model.architecture=null"
                )
    check_adaptable(config, seq_len)
    return config


def _load_base_config(model: ModelConfig) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(
            model.base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.base {model.base!r} cannot be loaded: {_reason(model.base, error)}") from None


def _reason(base: str, error: Exception) -> str:
    """Why a base cannot be loaded; the Hub's words about names do not help where a path was meant."""
    if base.startswith(("/", ".", "~")) and not Path(base).exists():
        return "there is no such folder"
    return without_passwords(str(error).splitlines()[0])


def architecture_config(architecture: dict[str, Any]) -> PretrainedConfig:
    """The configuration of transformers that model.architecture describes. Raises UserError."""
    settings = dict(architecture)
    model_type = settings.pop("model_type", None)
    try:
        known = AutoConfig.for_model(model_type)
    except (KeyError, ValueError):
        raise UserError(f"model.architecture has model_type={model_type!r}, which transformers does not know") from None
    unknown = [key for key in settings if not hasattr(known, key)]
    if unknown:
        raise UserError(f"model.architecture: a {model_type} has no setting {', '.join(unknown)}")
    try:
        return AutoConfig.for_model(model_type, **settings)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"model.architecture cannot be: {' '.join(str(error).split())}") from None


def check_adaptable(config: PretrainedConfig, seq_len: int) -> None:
    """Raise UserError for an architecture whose diffusion class would not compute what the causal model computes."""
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


def check_fits(config: RunConfig, base: PretrainedConfig, vocabulary: int) -> None:
    """Raise UserError where the model to train and the run do not fit; `vocabulary`: ids that the corpus may hold."""
    if config.model.init == "random":
        if base.vocab_size < vocabulary:
            raise UserError(
                f"model.architecture has vocab_size={base.vocab_size}, but the tokenizer of {config.model.base!r} has "
                f"{vocabulary} tokens; give at least as many"
            )
        return
    learnt = getattr(base, "diffusion", None) or {}
    shift = config.diffusion.shift if config.objective == "masked_diffusion" else True
    if learnt and learnt.get("shift", True) != shift:
        found = str(not shift).lower()
        needed = "set the same" if config.objective == "masked_diffusion" else "an autoregressive model has the shift"
        raise UserError(f"model.base {config.model.base!r} was trained with diffusion.shift={found}; {needed}")


def take_token_ids(config: PretrainedConfig, tokenizer: Any) -> None:
    """Give a new model the special ids of its tokenizer; a configuration class has defaults of some other one."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))


def load_tokenizer(model: ModelConfig) -> Any:
    """The base's tokenizer as it is, without a mask. Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(
            model.base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in model.base {model.base!r}: {_reason(model.base, error)}") from None


def add_mask_token(tokenizer: Any, model: ModelConfig, learnt: int | None = None) -> int:
    """Give `tokenizer` its mask token and return the id.

    That of a diffusion checkpoint stays: `learnt`, the mask_token_id of the base's configuration, where the tokenizer
    says the same. Raises UserError for an id outside the vocabulary.
    """
    if model.mask_token_id is None:
        if learnt is not None and tokenizer.mask_token_id == learnt:
            return learnt
        # lstrip: the space before a mask belongs to the word to be found, as in RoBERTa's tokenizer
        tokenizer.add_special_tokens({"mask_token": AddedToken(model.mask_token, lstrip=True, special=True)})
        return tokenizer.mask_token_id
    if not 0 <= model.mask_token_id < len(tokenizer):
        raise UserError(f"model.mask_token_id is {model.mask_token_id}, the vocabulary has 0 to {len(tokenizer) - 1}")
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(model.mask_token_id)
    return model.mask_token_id


def load_model(
    model: ModelConfig, config: PretrainedConfig, mask_token_id: int | None, dtype: torch.dtype, seed: int = 0
) -> Any:
    """The model at step 0, partitioned while loading where ZeRO-3 is on.

    A new mask token gets the mean of the other embeddings; that of a diffusion checkpoint stays. `mask_token_id` None
    adds none. `seed` decides the weights of model.init=random, whatever the ZeRO stage.
    Dropout is off: all randomness of a run is the noise, a function of (seed, row).
    """
    for key in vars(config):
        if ("dropout" in key or key.endswith("_pdrop")) and isinstance(getattr(config, key), float | int):
            setattr(config, key, 0.0)
    vocabulary = config.vocab_size
    new = model.mask_token_id is None and getattr(config, "mask_token_id", None) != mask_token_id
    with freed_memory_returns():
        if model.init == "random":
            loaded = _new_model(config, dtype, seed)
        else:
            loaded = diffusion_class(type(config)).from_pretrained(
                model.base,
                config=config,
                revision=model.revision,
                dtype=dtype,
                use_safetensors=True,
            )
    loaded.config.use_cache = False
    if mask_token_id is not None:
        loaded.config.mask_token_id = mask_token_id
        if mask_token_id >= vocabulary:
            loaded.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
        if new:
            heads = {id(m): m for m in (loaded.get_input_embeddings(), loaded.get_output_embeddings())}
            for module in heads.values():
                _set_row_to_mean(module, mask_token_id)
    loaded.attention_backend = model.attention
    loaded.loss_path = model.loss
    apply_kernels(loaded, model)
    return loaded


def _new_model(config: PretrainedConfig, dtype: torch.dtype, seed: int) -> Any:
    """A model of random weights.

    Under ZeRO-3 transformers draws no number until the whole model is made, elsewhere also for weights that it then
    draws again. So that a seed means the same weights everywhere, the first way is taken at all stages.
    """
    zero3 = is_deepspeed_zero3_enabled()
    torch.manual_seed(seed)
    with nullcontext() if zero3 else no_init_weights():
        model = diffusion_class(type(config))._from_config(config, attn_implementation=IMPLEMENTATION, dtype=dtype)
    if not zero3:
        # of a class that is not its own, transformers skips modules that only rescale others' weights, as GPT-2's do
        model.base_model.initialize_weights()
        model.init_weights()  # the head, and ties
    return model


def describe_model(config: PretrainedConfig, shipped: dict[str, Any]) -> None:
    """Write what the objective ships into the model's configuration, and nothing of what another one left there."""
    for key in ("diffusion", "mask_token_id", "is_causal"):
        if hasattr(config, key) and key not in shipped:
            delattr(config, key)
    config.update(shipped)


@contextmanager
def freed_memory_returns() -> Iterator[None]:
    """Inside this context, freed memory goes back to the operating system at once.

    Under ZeRO-3 a model is made and partitioned layer by layer. glibc keeps the freed blocks, though, and cannot
    reuse many of them, so that each rank peaks at a full copy (benchmarks/host_memory.md).
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
    finally:  # the values that glibc itself adapts to in a process with large tensors
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 64 << 20)


def apply_kernels(loaded: Any, model: ModelConfig) -> None:
    """Liger's kernels, activation checkpointing and torch.compile, as configured; the same model."""
    if model.liger:
        from liger_kernel.transformers.monkey_patch import (  # type: ignore[import-not-found]
            _apply_liger_kernel_to_instance,
        )

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
        try:
            loaded.compile_blocks()
        except ValueError as error:
            raise UserError(f"model.compile: {error}") from None


def check_acceleration(model: ModelConfig, forms: list[Form], device: str, dtype: torch.dtype) -> dict[str, str]:
    """The attention backend of each form of visibility. Raises UserError for what this machine cannot do."""
    try:
        select_loss(model.loss, device)
        found = {form.name: select_backend(model.attention, form, device, dtype) for form in forms}
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
