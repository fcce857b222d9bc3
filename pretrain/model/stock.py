"""Decoding with transformers' own class: for checkpoints that are loaded without the code beside them.

`"is_causal": false` in config.json lifts the causal mask of the architectures in BIDIRECTIONAL, so that the stock
decoder computes what the diffusion model computes. With the shift its row i predicts token i + 1.
"""

from types import SimpleNamespace
from typing import Any

import torch

from .generation import DiffusionGenerateOutput, decoding_arguments, generate
from .reading import uses_shift
from .visibility import positions_of

# model_type of the architectures whose stock attention obeys config.is_causal, under eager and sdpa
BIDIRECTIONAL = ("gemma3_text", "gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3")

# What only the project's own class can do: transformers' has no cache of windows and no shadows.
NEEDS_OUR_CLASS = ("cache", "compile", "verify_threshold")
FROM_HABIT = ("use_cache", "pad_token_id")

# custom_generate/generate.py of a checkpoint. transformers loads relative imports from the folder of the file, so the
# code of decoding has copies there: code found through the model would be that of another folder, perhaps not trusted.
CUSTOM_GENERATE = '''"""`model.generate` of transformers for a masked diffusion model: it fills mask tokens."""

from .stock import generate_as_diffusion


def generate(inputs=None, *, model, **kwargs):
    """See `diffusion_generate` in modeling_diffullama.py for the arguments."""
    return generate_as_diffusion(model, inputs, **kwargs)
'''


class StockModel:
    """A causal language model of transformers, called as decoding calls a diffusion model."""

    def __init__(self, model: Any):
        self.model, self.config, self.device = model, model.config, model.device
        self.generation_config = model.generation_config

    def __call__(
        self, input_ids: torch.Tensor, logits_at: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> SimpleNamespace:
        """`.logits` (N, V) of the N positions in `logits_at` (B, L), in row-major order; see DiffusionModel.forward."""
        extra = {}
        if attention_mask is not None:
            extra = {"attention_mask": attention_mask.long(), "position_ids": positions_of(attention_mask)}
        logits = self.model(input_ids=input_ids, use_cache=False, **extra).logits  # (B, L, V)
        if uses_shift(self.config):
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        return SimpleNamespace(logits=logits[logits_at])


@torch.no_grad()
def generate_as_diffusion(
    model: Any, inputs: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | DiffusionGenerateOutput:
    """`diffusion_generate` of a diffusion model, or of the class that AutoModelForCausalLM loads without remote code.

    Takes `inputs` or `input_ids` (B, L) and what `diffusion_generate` takes; with transformers' class nothing in
    NEEDS_OUR_CLASS. None counts as not given: transformers' `generate` passes None for what a caller left out. Nor do
    `use_cache` and `pad_token_id` count, which callers give from habit and which change nothing here.
    Raises ValueError for a model whose attention is still causal and for an argument that needs our class.
    """
    given = {name: value for name, value in kwargs.items() if value is not None and name not in FROM_HABIT}
    if inputs is not None:
        given["input_ids"] = inputs
    if hasattr(model, "diffusion_generate"):
        return model.diffusion_generate(**given)
    if getattr(model.config, "is_causal", True):
        raise ValueError(
            "the model attends causally: its config.json lacks `is_causal: false`. Load it with "
            "AutoModel.from_pretrained(path, trust_remote_code=True) and call diffusion_generate"
        )
    for name in NEEDS_OUR_CLASS:
        if given.get(name):
            raise ValueError(f"{name} needs AutoModel.from_pretrained(path, trust_remote_code=True)")
    stock = StockModel(model)
    return generate(stock, **decoding_arguments(stock, **given))
