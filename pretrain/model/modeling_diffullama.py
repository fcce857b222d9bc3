"""A causal language model of transformers read as a masked diffusion model; trained and shipped as is.

`diffusion_class(LlamaConfig)` is a subclass of LlamaForCausalLM with the same parameters under the
same names; only `forward` differs. Checkpoints name `AutoDiffusionLM` in their `auto_map`, so

    AutoModel.from_pretrained(path, trust_remote_code=True)

gives this class with `forward(input_ids).logits` of a masked language model and `diffusion_generate`.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig
from transformers.modeling_outputs import MaskedLMOutput

from .attention import IMPLEMENTATION, plan_for_window, prepare_attention
from .cache import WindowCache
from .generation import DiffusionGenerateOutput, decoding_arguments, generate
from .loss import VocabularyHead, select_loss
from .reading import uses_shift
from .sampling import State, states
from .stock import BIDIRECTIONAL, CUSTOM_GENERATE
from .visibility import Visibility, positions_of, with_padding

REMOTE_CODE = (
    "attention.py",
    "cache.py",
    "drawing.py",
    "forms.py",
    "generation.py",
    "loss.py",
    "modeling_diffullama.py",
    "reading.py",
    "rules.py",
    "sampling.py",
    "settings.py",
    "stock.py",
    "visibility.py",
)
# what generation without the model's own code needs
DECODING_CODE = tuple(name for name in REMOTE_CODE if name not in ("loss.py", "modeling_diffullama.py"))
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
        logits_at: torch.Tensor | None = None,
        past_key_values: WindowCache | None = None,
        **kwargs,
    ) -> DiffusionOutput:
        """Predict the tokens of a corrupted sequence.

        `input_ids` (B, L) hold mask tokens where tokens are unknown. `attention_mask` (B, L) is 0 at
        padding. Without `labels`: `logits` (B, L, V), where `logits[:, i]` predict token i. With the shift of
        the AR model (`config.diffusion["shift"]`, the default) hidden state i - 1 gives them; nothing predicts a
        row's first token then, and its logits repeat those of the second. With `logits_at` (B, L) bool, `logits`
        (N, V) only of the N positions where it is True, in row-major order: decoding asks about masks alone.
        With `labels` (B, L), -100 where no loss is wanted: `loss` and `nll` in nats, over labelled
        positions, and no logits, since only hidden states at labelled positions meet the vocabulary.
        `loss` is the mean, or the sum of `loss_weights` (B, L) times the nll of each labelled position.
        `visibility` is for training; the default is bidirectional.
        With a WindowCache whose `positions` (B, W) are set, `input_ids`, `position_ids` and `logits_at` are of those
        positions alone, and `attention_mask` (B, L) of all that the cache holds.
        Raises TypeError for an argument that it would have to ignore, or another cache, and ValueError for a padded
        row with zeros between tokens or a label that nothing predicts.
        """
        ignored = [k for k, v in kwargs.items() if v is not None and v is not False and k not in HARMLESS]
        if ignored:
            raise TypeError(f"forward() of a diffusion model takes no {', '.join(ignored)}")
        if not isinstance(past_key_values, WindowCache | None):
            raise TypeError(f"past_key_values is a {type(past_key_values).__name__}, expected a WindowCache")
        if past_key_values is not None and past_key_values.positions is not None:
            plan = plan_for_window(attention_mask)
        else:
            visibility = visibility or Visibility()
            if attention_mask is not None and not attention_mask.bool().all():
                visibility = with_padding(visibility, attention_mask)
                position_ids = positions_of(attention_mask) if position_ids is None else position_ids
            batch, length = input_ids.shape
            plan = prepare_attention(
                visibility, batch, length, input_ids.device, self.dtype, self.attention_backend
            )  # fmt: skip
        hidden = self.diffusion_backbone(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=False,
            attention_plan=plan,
        ).last_hidden_state  # (B, L, H)
        head = self.vocabulary_head()
        shift = uses_shift(self.config)
        if labels is None:
            if shift:
                hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
            return DiffusionOutput(logits=head(hidden if logits_at is None else hidden[logits_at]))
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

    @property
    def diffusion_backbone(self) -> Any:
        """What gives hidden states: the base model, or without gradients what was compiled for decoding."""
        frozen = None if torch.is_grad_enabled() else self.__dict__.get("_frozen_for_decoding")
        return self.base_model if frozen is None else frozen

    def vocabulary_head(self) -> Any:
        """The output layer, which also computes the loss."""
        head = self.get_output_embeddings()
        if type(head) is torch.nn.Linear:
            head.__class__ = VocabularyHead
        return head

    def diffusion_generate(
        self, input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor | DiffusionGenerateOutput:
        """Replace the mask tokens of `input_ids` (B, L) by samples; given tokens stay. See `generation.generate`.

        Returns ids (B, L), or with `return_dict_in_generate` a DiffusionGenerateOutput. The arguments, in the words
        of transformers' `generate` where it has them:
            attention_mask (B, L)   0 at padding, before or after a row
            max_new_tokens          append so many masks to each row; without `input_ids`, to the start token
            steps                   the most model calls a row takes, but one a block; default: one a mask
            order                   random (Algorithm 2), confidence, margin, entropy or left_to_right
            block_length            fill so many masks at a time, from left to right
            threshold, factor, entropy_bound, kl_threshold
                                    commit more than one token where the model is sure: Fast-dLLM's two rules, the
                                    entropy bound, KLASS
            verify_threshold, remasking
                                    take tokens back: WINO, ReMDM
            temperature, top_k, top_p, min_p, repetition_penalty, do_sample
            cache, refresh_every    "window": compute the block alone between full passes; an approximation
            compile                 torch.compile, for static shapes
            streamer                for one row; transformers' TextDiffusionStreamer shows drafts
            generator               a torch.Generator, or one a row
            eos_token_id            ends a text in a gap at the end of a row; -1: nothing does
            generation_config       in place of the model's own, which gives the defaults
        Raises TypeError for an unknown argument, ValueError for a bad one.
        """
        return generate(self, **decoding_arguments(self, input_ids, **kwargs))

    def diffusion_states(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Iterator[State]:
        """What stands after each step of `diffusion_generate` with the same arguments, streamer apart."""
        for name in ("streamer", "return_dict_in_generate"):
            if name in kwargs:
                raise TypeError(f"diffusion_states() takes no {name}: it yields the states themselves")
        return states(self, **decoding_arguments(self, input_ids, **kwargs))

    def generate(self, *args, **kwargs) -> NoReturn:
        raise TypeError("a diffusion model does not decode from left to right; use diffusion_generate")

    def blocks(self) -> torch.nn.ModuleList:
        """The transformer's blocks: the one list of as many modules as the configuration has layers.

        Raises ValueError where there is none.
        """
        layers = self.config.num_hidden_layers
        found = [m for m in self.base_model.children() if isinstance(m, torch.nn.ModuleList) and len(m) == layers]
        if len(found) != 1:
            raise ValueError(f"the blocks of {type(self.base_model).__name__} are not found, so as to compile them")
        return found[0]

    def compile_blocks(self) -> None:
        """torch.compile each block, once; each new shape of input is compiled anew."""
        for block in self.blocks():
            if block._compiled_call_impl is None:
                block.compile(dynamic=False)

    def compile_for_decoding(self) -> None:
        """torch.compile the whole model without gradients, once; each new shape of input is compiled anew.

        On a CPU its weights are frozen into what is compiled, packed for few rows, which takes their memory once more:
        weights that change afterwards change nothing.
        """
        if "_frozen_for_decoding" not in self.__dict__:
            options: Any = {"freezing": True} if self.device.type == "cpu" else None
            compiled = torch.compile(self.base_model, dynamic=False, options=options)
            self.__dict__["_frozen_for_decoding"] = compiled  # beside the submodules: state_dict stays as it is

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Weights, configuration and the code that loads them, complete for `from_pretrained`."""
        self.describe_code()
        super().save_pretrained(save_directory, **kwargs)
        self.save_code(save_directory)

    def describe_code(self) -> None:
        """Name this code in the configuration, and make transformers' own bidirectional where it can be."""
        self.config.auto_map = dict(AUTO_MAP)
        if self.config.model_type in BIDIRECTIONAL:
            self.config.is_causal = False

    def save_code(self, save_directory: str | Path) -> None:
        """What a folder with weights and configuration also needs for `trust_remote_code`."""
        folder = Path(save_directory)
        own = folder / "custom_generate"
        own.mkdir(exist_ok=True)
        for target in [*(folder / name for name in REMOTE_CODE), *(own / name for name in DECODING_CODE)]:
            source = Path(__file__).with_name(target.name)
            if not target.exists() or not target.samefile(source):
                shutil.copyfile(source, target)
        (own / "generate.py").write_text(CUSTOM_GENERATE, encoding="utf-8")


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
