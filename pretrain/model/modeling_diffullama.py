"""A causal language model of transformers read as a masked diffusion model; trained and shipped as is.

`diffusion_class(LlamaConfig)` is a subclass of LlamaForCausalLM with the same parameters under the
same names; only `forward` differs. Checkpoints name `DiffuLlamaForMaskedLM` in their `auto_map`, so

    AutoModel.from_pretrained(path, trust_remote_code=True)

gives this class with `forward(input_ids).logits` of a masked language model and `diffusion_generate`.
"""

import shutil
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig
from transformers.modeling_outputs import MaskedLMOutput

from .attention import IMPLEMENTATION, plan
from .loss import VocabularyHead
from .loss import choose as choose_loss
from .sampling import generate
from .visibility import Visibility, starts

REMOTE_CODE = ("attention.py", "loss.py", "modeling_diffullama.py", "sampling.py", "visibility.py")
AUTO_MAP = {name: "modeling_diffullama.DiffuLlamaForMaskedLM" for name in ("AutoModel", "AutoModelForMaskedLM")}
IGNORE = -100  # label of positions that bear no loss, as everywhere in transformers


@dataclass
class DiffusionOutput(MaskedLMOutput):
    """MaskedLMOutput, and of each labelled position, in row-major order: `nll` (labelled,), its loss in nats, and
    `predicted` (labelled,), its most likely token, where no gradients are wanted."""

    nll: torch.Tensor | None = None
    predicted: torch.Tensor | None = None


class DiffusionModel:
    """The methods that turn a `...ForCausalLM` of transformers into a masked diffusion model.

    `attention_backend` and `loss_path` say how to compute, not what: auto, or a name in attention.BACKENDS
    and loss.LOSSES.
    """

    attention_backend = "auto"
    loss_path = "auto"

    @classmethod
    def from_pretrained(cls, *args, attn_implementation: str = IMPLEMENTATION, **kwargs):
        """As in transformers; raises ValueError for an attention implementation that would stay causal."""
        if attn_implementation != IMPLEMENTATION:
            raise ValueError(
                f"attn_implementation={attn_implementation!r} attends causally; a diffusion model takes "
                f"{IMPLEMENTATION!r}, whose kernel its attention_backend chooses"
            )
        return super().from_pretrained(*args, attn_implementation=attn_implementation, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weights: torch.Tensor | None = None,
        visibility: Visibility | None = None,
        **kwargs,
    ) -> DiffusionOutput:
        """Predict the tokens of a corrupted sequence.

        `input_ids` (B, L) hold mask tokens where tokens are unknown. `attention_mask` (B, L) is 0 at
        padding. Without `labels`: `logits` (B, L, V), where `logits[:, i]` predict token i: the shift
        is done here. Nothing predicts a row's first token; its logits repeat those of the second.
        With `labels` (B, L), -100 where no loss is wanted: `loss` and `nll` in nats, over labelled
        positions, and no logits, since only hidden states at labelled positions meet the vocabulary.
        `loss` is the mean, or the sum of `loss_weights` (labelled,) times `nll`.
        `visibility` is for training; the default is bidirectional.
        """
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
            head.__class__ = VocabularyHead  # the same module with one more use
        batch, length = input_ids.shape
        hidden = self.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            attention_plan=plan(visibility, batch, length, input_ids.device, self.dtype, self.attention_backend),
        ).last_hidden_state  # (B, L, H); hidden[:, i - 1] predicts token i
        if labels is None:
            shifted = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
            return DiffusionOutput(logits=head(shifted))
        if (labels[:, 0] != IGNORE).any():
            raise ValueError("labels has a value at the first token of a row, which nothing predicts")
        chosen = labels[:, 1:] != IGNORE
        targets = labels[:, 1:][chosen]
        if loss_weights is None:
            loss_weights = torch.full(targets.shape, 1 / max(1, len(targets)), device=hidden.device)
        how = choose_loss(self.loss_path, hidden.device)
        loss, nll, predicted = head(hidden[:, :-1][chosen], targets, loss_weights, how)
        return DiffusionOutput(loss=loss, nll=nll, predicted=predicted)

    def diffusion_generate(self, input_ids: torch.LongTensor, **kwargs):
        """Replace the mask tokens of `input_ids` (B, L) by samples; see `sampling.generate`."""
        return generate(self, input_ids, **kwargs)

    def generate(self, *args, **kwargs):
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
    base = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    if not base._supports_attention_backend:
        raise ValueError(f"{base.__name__} does not route its attention through AttentionInterface")
    return type(f"Diffusion{base.__name__}", (DiffusionModel, base), {"__module__": __name__})


class DiffuLlamaForMaskedLM:
    """The entry named in `auto_map`: loads the diffusion class of whatever architecture the configuration names.

    No PreTrainedModel itself, since it stands for any architecture and so has no configuration class.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: object = "AutoModel") -> None:
        """Called by the Auto classes; `save_pretrained` of the loaded model writes its auto_map by itself."""

    @classmethod
    def from_pretrained(cls, path, *args, config: PretrainedConfig | None = None, **kwargs):
        config = config or AutoConfig.from_pretrained(path)
        return diffusion_class(type(config)).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: PretrainedConfig, **kwargs):
        kwargs["attn_implementation"] = IMPLEMENTATION
        return diffusion_class(type(config))._from_config(config, **kwargs)
