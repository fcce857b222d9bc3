"""`diffusion_generate`: runs the decoding loop to its end, tells a streamer, and counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils.generic import ModelOutput

from .sampling import State, states
from .settings import NAMES, SamplingSettings

PASSED_ON = ("generator", "streamer", "return_dict_in_generate")


@dataclass
class DiffusionGenerateOutput(ModelOutput):
    """What `diffusion_generate` returns with `return_dict_in_generate`."""

    sequences: torch.Tensor | None = None  # (B, L)
    nfe: torch.Tensor | None = None  # (B,): model calls that each row took
    tokens_per_forward: torch.Tensor | None = None  # (B,): found tokens ÷ nfe; what an end-of-text cut off is not found
    step_of: torch.Tensor | None = None  # (B, L): the step that committed each token, from 0; -1: given or cut off
    confidence: torch.Tensor | None = None  # (B, L): as in State
    history: tuple[torch.Tensor, ...] | None = None  # ids (B, L) after each step


def append_masks(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, count: int, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(ids, attention mask), (B, L + count): each row with `count` masks after its last token, padding after them."""
    if attention_mask is None:
        return torch.cat([input_ids, input_ids.new_full((len(input_ids), count), mask_token_id)], dim=1), None
    length = input_ids.shape[1]
    place = torch.arange(length + count, device=input_ids.device).expand(len(input_ids), -1)
    index = torch.arange(1, length + 1, device=input_ids.device)
    end = (attention_mask.bool() * index).amax(dim=1, keepdim=True)  # (B, 1): after the last token
    new = (place >= end) & (place < end + count)
    source = torch.where(place < end, place, (place - count).clamp(min=0))
    ids = input_ids.gather(1, source).masked_fill(new, mask_token_id)
    return ids, attention_mask.gather(1, source).masked_fill(new, 1)


def decoding_arguments(
    model: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int | None = None,
    generation_config: GenerationConfig | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    mask_token_id: int | None = None,
    do_sample: bool | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """The arguments of `generate`, from those of `diffusion_generate`; what is not given, from `generation_config`.

    Raises TypeError for an unknown argument and ValueError for a bad one.
    """
    defaults = generation_config or getattr(model, "generation_config", None)
    given = {name: kwargs.pop(name) for name in NAMES if name in kwargs}
    others = {name: kwargs.pop(name) for name in PASSED_ON if name in kwargs}
    if kwargs:
        raise TypeError(f"diffusion_generate() takes no {', '.join(kwargs)}")
    if given.get("temperature", 0) is None:
        del given["temperature"]
    for name in NAMES:
        value = getattr(defaults, name, None)
        if value is not None:
            given.setdefault(name, value)
    if do_sample is False:
        given["temperature"] = 0.0
    settings = SamplingSettings(**given)
    mask: int = model.config.mask_token_id if mask_token_id is None else mask_token_id
    if eos_token_id is None:
        eos_token_id = getattr(defaults, "eos_token_id", None)
    if eos_token_id is None:
        eos_token_id = getattr(model.config, "eos_token_id", None)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    if input_ids is None:
        if max_new_tokens is None:
            raise ValueError("diffusion_generate() needs input_ids with masks, or max_new_tokens")
        input_ids = torch.full((1, 1), start_token(model.config), device=model.device)
    if max_new_tokens is not None:
        input_ids, attention_mask = append_masks(input_ids, attention_mask, max_new_tokens, mask)
    _check_shapes(model, input_ids, attention_mask)
    if settings.compile:
        model.compile_blocks()
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "eos_token_id": eos_token_id,
        "mask_token_id": mask,
        "settings": settings,
        **others,
    }


def start_token(config: Any) -> int:
    """The token that stands before a text which begins with a gap. Raises ValueError where there is none."""
    token = (getattr(config, "diffusion", None) or {}).get("start_token_id", getattr(config, "bos_token_id", None))
    if token is None:
        raise ValueError("the model has no start token; begin with a token of your own")
    return token


def _check_shapes(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (rows, tokens)")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}; "
            "expected the same"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and input_ids.shape[1] > limit:
        raise ValueError(f"{input_ids.shape[1]} tokens with the masks, but the model takes {limit}")


def generate(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    streamer: Any = None,
    return_dict_in_generate: bool = False,
    **settings: Any,
) -> torch.Tensor | DiffusionGenerateOutput:
    """Replace every mask token of `input_ids` (B, L) by a sample; other tokens stay. The arguments are of `states`.

    `streamer`, for one row: gets the tokens that have come to stay from the left (`put`), and where it has
    `put_draft` also the rest with the model's proposals, after each step; transformers' TextDiffusionStreamer.
    """
    if streamer is not None and len(input_ids) != 1:
        raise ValueError(f"a streamer shows one row, and input_ids has {len(input_ids)}")
    stream = None
    if streamer is not None:
        stream = _Stream(streamer, settings.get("settings") or SamplingSettings())
    ids, forwards = input_ids.clone(), torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
    step_of = torch.full_like(input_ids, -1)
    confidence = torch.full(input_ids.shape, torch.nan, device=input_ids.device)
    history = []
    for step, state in enumerate(states(model, input_ids, attention_mask, **settings)):
        if stream is not None:
            stream.show(state, state.masked[0] | ~state.confidence[0].isnan())
        if return_dict_in_generate:
            step_of = step_of.masked_fill(state.committed, step).masked_fill(state.confidence.isnan(), -1)
            history.append(state.ids)
        ids, forwards, confidence = state.ids, state.forwards, state.confidence
    if stream is not None:
        stream.end(ids)
    if not return_dict_in_generate:
        return ids
    per_forward = (step_of >= 0).sum(dim=1) / forwards.clamp(min=1)
    return DiffusionGenerateOutput(ids, forwards, per_forward, step_of, confidence, tuple(history))


class _Stream:
    """Tells a streamer of transformers what stands after each step."""

    def __init__(self, streamer: Any, settings: SamplingSettings):
        self.streamer, self.revises = streamer, settings.revises
        self.said = 0  # tokens that the streamer has got for good
        self.begun = False

    def show(self, state: State, asked: torch.Tensor) -> None:
        """`asked` (L,) bool: the masks that the row began with."""
        if not self.begun:  # a streamer takes the first tokens that it gets for the prompt
            self.begun = True
            self._put(state.ids[0, : int(asked.long().argmax())])
        unsettled = state.masked[0]
        if self.revises and unsettled.any():  # what has been found may still be taken back
            unsettled = asked
        end = int(unsettled.long().argmax()) if unsettled.any() else len(unsettled)
        self._put(state.ids[0, self.said : end])
        if unsettled.any() and hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(state.draft[0, self.said :].cpu())

    def _put(self, tokens: torch.Tensor) -> None:
        if len(tokens):
            self.streamer.put(tokens.cpu())
            self.said += len(tokens)

    def end(self, sequences: torch.Tensor) -> None:
        self._put(sequences[0, self.said :])
        self.streamer.end()
