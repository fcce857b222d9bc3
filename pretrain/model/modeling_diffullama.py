"""A causal language model of transformers read as a masked diffusion model; trained and shipped as is.

`diffusion_class(LlamaConfig)` is a subclass of LlamaForCausalLM with the same parameters under the
same names; only `forward` differs. Checkpoints name `AutoDiffusionLM` in their `auto_map`, so

    AutoModel.from_pretrained(path, trust_remote_code=True)

gives this class with `forward(input_ids).logits` of a masked language model and `diffusion_generate`.
"""

import shutil
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig
from transformers.modeling_outputs import MaskedLMOutput

from .attention import IMPLEMENTATION, prepare_attention
from .loss import VocabularyHead, select_loss
from .sampling import generate, uses_shift
from .visibility import Visibility, starts

REMOTE_CODE = ("attention.py", "forms.py", "loss.py", "modeling_diffullama.py", "sampling.py", "visibility.py")
AUTO_MAP = {name: "modeling_diffullama.AutoDiffusionLM" for name in ("AutoModel", "AutoModelForMaskedLM")}
HARMLESS = ("return_dict", "token_type_ids")  # what callers give any model, and what changes nothing here
IGNORE = -100  # label of positions that bear no loss, as everywhere in transformers


# The base class of DiffusionModel is whatever ...ForCausalLM it is mixed into; type checkers may take it for any.
_CausalLM: Any = object


@dataclass
class DiffusionOutput(MaskedLMOutput):
    """MaskedLMOutput, and of each labelled position, in row-major order: `nll` (labelled,), its loss in nats, and
    `predicted` (labelled,), its most likely token, where no gradients are wanted."""

    nll: torch.Tensor | None = None
    predicted: torch.Tensor | None = None


class DiffusionModel(_CausalLM):
    """The methods that turn a `...ForCausalLM` of transformers into a masked diffusion model.

    `attention_backend` and `loss_path` say how to compute, not what: `model.attention` and `model.loss` of the
    run configuration.
    """

    attention_backend = "auto"
    loss_path = "auto"

    @classmethod
    def from_pretrained(cls, *args, attn_implementation: str = IMPLEMENTATION, **kwargs) -> "DiffusionModel":
        """As in transformers; raises ValueError for an attention implementation that would stay causal."""
        if attn_implementation != IMPLEMENTATION:
            raise ValueError(
                f"attn_implementation={attn_implementation!r} attends causally; a diffusion model takes "
                f"{IMPLEMENTATION!r}, whose kernel its attention_backend chooses"
            )
        return super().from_pretrained(*args, attn_implementation=attn_implementation, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        visibility: Visibility | None = None,
        **kwargs,
    ) -> DiffusionOutput:
        """Predict the tokens of a corrupted sequence.

        `input_ids` (B, L) hold mask tokens where tokens are unknown. `attention_mask` (B, L) is 0 at
        padding. Without `labels`: `logits` (B, L, V), where `logits[:, i]` predict token i. With the shift of
        the AR model (`config.diffusion["shift"]`, the default) hidden state i - 1 gives them; nothing predicts a
        row's first token then, and its logits repeat those of the second.
        With `labels` (B, L), -100 where no loss is wanted: `loss` and `nll` in nats, over labelled
        positions, and no logits, since only hidden states at labelled positions meet the vocabulary.
        `loss` is the mean, or the sum of `loss_weights` (B, L) times the nll of each labelled position.
        `visibility` is for training; the default is bidirectional.
        Raises TypeError for an argument that it would have to ignore, such as `past_key_values`, and ValueError for
        a padded row with zeros between tokens or a label that nothing predicts.
        """
        ignored = [k for k, v in kwargs.items() if v is not None and v is not False and k not in HARMLESS]
        if ignored:
            raise TypeError(f"forward() of a diffusion model takes no {', '.join(ignored)}")
        visibility = visibility or Visibility()
        if attention_mask is not None and not attention_mask.bool().all():
            if visibility.documents is not None:
                raise ValueError("attention_mask is for rows with padding, not for packed rows with documents")
            real = attention_mask.long()
            if (starts(real) & (real == 1)).sum(dim=1).max() > 1:
                raise ValueError("attention_mask has zeros between tokens; padding stands before or after a row")
            visibility = replace(visibility, documents=real)  # tokens and padding do not see each other
            if position_ids is None:  # left padding does not move a sequence
                position_ids = (real.cumsum(1) - 1).clamp(min=0)
        head = self.get_output_embeddings()
        if type(head) is torch.nn.Linear:
            head.__class__ = VocabularyHead
        batch, length = input_ids.shape
        hidden = self.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            attention_plan=prepare_attention(
                visibility, batch, length, input_ids.device, self.dtype, self.attention_backend
            ),
        ).last_hidden_state  # (B, L, H)
        shift = uses_shift(self.config)
        if labels is None:
            if shift:
                hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
            return DiffusionOutput(logits=head(hidden))
        if shift:
            if (labels[:, 0] != IGNORE).any():
                raise ValueError("labels has a value at the first token of a row, which nothing predicts")
            hidden, labels = hidden[:, :-1], labels[:, 1:]
            loss_weights = None if loss_weights is None else loss_weights[:, 1:]
        chosen = labels != IGNORE
        targets = labels[chosen]  # (labelled,)
        if loss_weights is None:
            weights = torch.full(targets.shape, 1 / max(1, len(targets)), device=hidden.device)
        else:
            weights = loss_weights[chosen]
        loss, nll, predicted = head(hidden[chosen], select_loss(self.loss_path, hidden.device), targets, weights)
        return DiffusionOutput(loss=loss, nll=nll, predicted=predicted)

    def diffusion_generate(
        self, input_ids: torch.Tensor, **kwargs
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Replace the mask tokens of `input_ids` (B, L) by samples; see `sampling.generate`."""
        return generate(self, input_ids, **kwargs)

    def generate(self, *args, **kwargs) -> NoReturn:
        raise TypeError("a diffusion model does not decode from left to right; use diffusion_generate")

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Weights, configuration and the code that loads them, complete for `from_pretrained`."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)
        self.save_code(save_directory)

    def save_code(self, save_directory: str | Path) -> None:
        """What a folder with weights and configuration also needs for `trust_remote_code`."""
        self.config.auto_map = dict(AUTO_MAP)
        for name in REMOTE_CODE:
            target = Path(save_directory) / name
            if not target.exists() or not target.samefile(Path(__file__).with_name(name)):
                shutil.copyfile(Path(__file__).with_name(name), target)


@lru_cache
def diffusion_class(config_class: type[PretrainedConfig]) -> type:
    """The diffusion subclass of the causal LM that transformers has for a configuration class.

    Raises ValueError when there is none, or its attention bypasses AttentionInterface.
    """
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"transformers has no causal language model for {config_class.__name__}")
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    if not base._supports_attention_backend:
        raise ValueError(f"{base.__name__} does not route its attention through AttentionInterface")
    return type(f"Diffusion{base.__name__}", (DiffusionModel, base), {"__module__": __name__})


class AutoDiffusionLM:
    """The entry named in `auto_map`: loads the diffusion class of whatever architecture the configuration names.

    No PreTrainedModel itself, since it stands for any architecture and so has no configuration class.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: object = "AutoModel") -> None:
        """Called by the Auto classes; `save_pretrained` of the loaded model writes its auto_map by itself."""

    @classmethod
    def from_pretrained(cls, path, *args, config: PretrainedConfig | None = None, **kwargs) -> DiffusionModel:
        config = config or AutoConfig.from_pretrained(path)
        return diffusion_class(type(config)).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: PretrainedConfig, **kwargs):
        kwargs["attn_implementation"] = IMPLEMENTATION
        return diffusion_class(type(config))._from_config(config, **kwargs)
