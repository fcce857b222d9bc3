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
RULES = ("order", "threshold", "factor", "entropy_bound", "kl_threshold", "verify_threshold")  # one replaces all


@dataclass
class DiffusionGenerateOutput(ModelOutput):
    """What `diffusion_generate` returns with `return_dict_in_generate`."""

    sequences: torch.Tensor | None = None  # (B, L)
    nfe: torch.Tensor | None = None  # (B,): model calls that each row took
    tokens_per_forward: torch.Tensor | None = None  # (B,): found tokens ÷ nfe; what an end-of-text cut off is not found
    step_of: torch.Tensor | None = None  # (B, L): the state that each token came with, from 0; -1: given or cut off
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


def settings_from(defaults: Any, given: dict[str, Any], do_sample: bool | None = None) -> SamplingSettings:
    """The settings given by name, and for the others those of a GenerationConfig, or of SamplingSettings.

    What is given, though it be None, counts before the defaults; and one rule given replaces all rules of the defaults
    (RULES), the cache given also how often it is refreshed. `do_sample` False, given or by default, takes the most
    probable tokens unless a temperature is given. Raises ValueError for bad settings.
    """
    chosen = dict(given)
    for name in ("temperature", "remasking", "compile"):  # they have no None
        if chosen.get(name, 0) is None:
            del chosen[name]
    replaced = set(RULES) if not chosen.keys().isdisjoint(RULES) else set()
    replaced |= {"refresh_every"} if "cache" in chosen else set()
    for name in NAMES:
        value = getattr(defaults, name, None)
        if value is not None and name not in replaced:
            chosen.setdefault(name, value)
    do_sample = getattr(defaults, "do_sample", None) if do_sample is None else do_sample
    if given.get("temperature") is None and do_sample is False:
        chosen["temperature"] = 0.0
    return SamplingSettings(**chosen)


def decoding_arguments(
    model: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int | None = None,
    generation_config: GenerationConfig | None = None,
    eos_token_id: int | Sequence[int] | torch.Tensor | None = None,
    mask_token_id: int | None = None,
    do_sample: bool | None = None,
    token_type_ids: torch.Tensor | None = None,  # what tokenizers give; it changes nothing here
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
    settings = settings_from(defaults, given, do_sample)
    mask: int = model.config.mask_token_id if mask_token_id is None else mask_token_id
    for place in (defaults, model.config):
        eos_token_id = getattr(place, "eos_token_id", None) if eos_token_id is None else eos_token_id
    if max_new_tokens is None and (input_ids is None or not (input_ids == mask).any()):
        max_new_tokens = getattr(defaults, "max_new_tokens", None)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    if input_ids is None:
        if max_new_tokens is None:
            raise ValueError("diffusion_generate() needs input_ids with masks, or max_new_tokens")
        input_ids = torch.full((1, 1), start_token(model.config), device=model.device)
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (rows, tokens)")
    if max_new_tokens is not None:
        input_ids, attention_mask = append_masks(input_ids, attention_mask, max_new_tokens, mask)
    _check_shapes(model, input_ids, attention_mask)
    if settings.compile:
        if settings.cache and len(input_ids) > 1:
            raise ValueError("compile with a cache is for one text at a time: the shapes of a batch change")
        model.compile_for_decoding()
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
    """Raise ValueError where the mask does not fit, or a row is longer than the model takes."""
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}; "
            "expected the same"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = input_ids.shape[1]
    if attention_mask is not None and attention_mask.numel():
        longest = int(attention_mask.sum(dim=1).max())
    if limit and longest > limit:
        raise ValueError(f"{longest} tokens with the masks, but the model takes {limit}")


def generate(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    streamer: Any = None,
    return_dict_in_generate: bool = False,
    settings: SamplingSettings | None = None,
    **others: Any,
) -> torch.Tensor | DiffusionGenerateOutput:
    """Replace every mask token of `input_ids` (B, L) by a sample; other tokens stay. The `others` are of `states`.

    `streamer`, for one row: gets the tokens that have come to stay from the left (`put`), and where it has
    `put_draft` also the rest with the model's proposals, after each step; transformers' TextDiffusionStreamer.
    """
    if streamer is not None and len(input_ids) != 1:
        raise ValueError(f"a streamer shows one row, and input_ids has {len(input_ids)}")
    stream = None
    if streamer is not None:
        first = 0 if attention_mask is None else int(attention_mask[0].long().argmax())
        last = None if attention_mask is None else first + int(attention_mask[0].sum())
        stream = _Stream(streamer, settings or SamplingSettings(), first, last)
    ids, nfe = input_ids.clone(), torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
    step_of = torch.full_like(input_ids, -1)
    confidence = torch.full(input_ids.shape, torch.nan, device=input_ids.device)
    history = []
    for step, state in enumerate(states(model, input_ids, attention_mask, settings=settings, **others)):
        if stream is not None:
            stream.show(state, state.masked[0] | ~state.confidence[0].isnan())
        if return_dict_in_generate:
            step_of = step_of.masked_fill(state.committed, step).masked_fill(state.confidence.isnan(), -1)
            history.append(state.ids)
        ids, nfe, confidence = state.ids, state.nfe, state.confidence
    if stream is not None:
        stream.end(ids)
    if not return_dict_in_generate:
        return ids
    per_forward = (step_of >= 0).sum(dim=1) / nfe.clamp(min=1)
    return DiffusionGenerateOutput(ids, nfe, per_forward, step_of, confidence, tuple(history))


class _Stream:
    """Tells a streamer of transformers what stands after each step, without padding."""

    def __init__(self, streamer: Any, settings: SamplingSettings, first: int, last: int | None):
        self.streamer, self.revises = streamer, settings.revises
        self.said, self.last = first, last  # up to where the streamer has got tokens for good, and where they end
        self.begun = False

    def show(self, state: State, asked: torch.Tensor) -> None:
        """`asked` (L,) bool: the masks that the row began with."""
        if not self.begun:  # a streamer takes the first tokens that it gets for the prompt
            self.begun = True
            self._put(state.ids[0], int(asked.long().argmax()))
        unsettled = state.masked[0]
        if self.revises and unsettled.any():  # what has been found may still be taken back
            unsettled = asked
        if unsettled.any():
            self._put(state.ids[0], int(unsettled.long().argmax()))
            if hasattr(self.streamer, "put_draft"):
                self.streamer.put_draft(state.draft[0, self.said : self.last].cpu())

    def _put(self, ids: torch.Tensor, end: int | None) -> None:
        tokens = ids[self.said : end]
        if len(tokens):
            self.streamer.put(tokens.cpu())
            self.said += len(tokens)

    def end(self, sequences: torch.Tensor) -> None:
        self._put(sequences[0], self.last)
        self.streamer.end()
