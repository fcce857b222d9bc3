"""Autoregressive models beside diffusion models: which is which, loading, and texts by transformers' generate."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from common.errors import UserError

from ..decoding import GAP, Completion, Request, encode, padded_left
from ..loading import load_any, read_config


def check_diffusion(name: str) -> Any:
    """The configuration of a diffusion checkpoint. Raises UserError, before any weight is read, for another."""
    config = read_config(name)
    if getattr(config, "mask_token_id", None) is None:
        raise UserError(
            f"{name} is an autoregressive model (no mask_token_id in its config.json); expected a diffusion "
            "checkpoint of `python -m tools.export` or `python -m tools.import_checkpoint`"
        )
    return config


def check_autoregressive(name: str, flag: str) -> Any:
    """The configuration of an AR model. Raises UserError, before any weight is read, for a diffusion checkpoint."""
    config = read_config(name)
    if getattr(config, "mask_token_id", None) is not None:
        raise UserError(
            f"{flag} {name} is a diffusion model (mask_token_id {config.mask_token_id}); expected an autoregressive one"
        )
    return config


def load_autoregressive(name: str, flag: str, device: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of an AR model in eval mode. Its own sampling defaults are put aside.

    Raises UserError for a diffusion checkpoint and for one that cannot be loaded.
    """
    check_autoregressive(name, flag)
    model, tokenizer = load_any(name, "autoregressive", device=torch.device(device) if device else None)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model, tokenizer


def start_of_text(tokenizer: Any) -> int | None:
    """The token before a text that has nothing before it: the start token, else the one between texts, else None."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def position_limit(config: Any) -> int | None:
    """Tokens that a model takes, where its configuration says so."""
    return getattr(config, "max_position_embeddings", None)


class Draws(LogitsProcessor):
    """Makes generate's argmax a draw at a temperature: each row gets Gumbel noise of a generator of its own.

    So a text depends on its own random numbers alone, whatever else is in the batch. Temperature 0 adds nothing.
    """

    def __init__(self, generators: Sequence[torch.Generator], temperature: float):
        self.generators, self.temperature = generators, temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) with noise."""
        if self.temperature == 0:
            return scores
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=g, dtype=torch.float64) for g in self.generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        return scores.double() / self.temperature + gumbel.to(scores.device)


@torch.no_grad()
def continue_all(
    model: Any, tokenizer: Any, requests: Sequence[Request], seed: int, batch_size: int, temperature: float, length: int
) -> Iterator[list[Completion]]:
    """Texts of exactly `length` new tokens by generate with its KV cache, a batch at a time, in the requests' order.

    Of a request only its text before the gap and its random numbers count: the ids are another tokenizer's.
    """
    for begin in range(0, len(requests), batch_size):
        batch = requests[begin : begin + batch_size]
        rows = [prompt_ids(tokenizer, request.text) for request in batch]
        ids, real = (part.to(model.device) for part in padded_left(rows))
        width = ids.shape[1]
        draws = Draws([request.generator(seed) for request in batch], temperature)
        out = model.generate(
            ids,
            attention_mask=real,
            do_sample=False,
            max_new_tokens=length,
            use_cache=True,
            logits_processor=LogitsProcessorList([draws]),
        )
        texts = [
            tokenizer.decode(row[width - len(prompt) :], skip_special_tokens=True) for row, prompt in zip(out, rows)
        ]
        yield [Completion(request, text, length, 1.0, 0.0) for request, text in zip(batch, texts, strict=True)]


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of the text before its gap, or of the token that begins a text where there is none before it."""
    return encode(GAP.split(text)[0], tokenizer, -1, start_of_text(tokenizer))


def context_of(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of the given tokens, as it stands at the front of the completed text."""
    return tokenizer.decode(list(ids), skip_special_tokens=True)
