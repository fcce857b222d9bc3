"""From text with gaps to ids and back: what every tool that writes with a diffusion model needs.

[MASK:n] stands for n unknown tokens; a text may have several.
"""

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from common.errors import UserError
from pretrain.model.generation import settings_from
from pretrain.model.modeling_diffullama import diffusion_class
from pretrain.model.reading import uses_shift
from pretrain.model.settings import SamplingSettings

GAP = re.compile(r" ?\[MASK:(\d+)\]")  # the space before a gap belongs to the word to be found


def load(checkpoint: str, trust_remote_code: bool = False, device: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of an exported checkpoint, in eval mode. Raises UserError where it is no diffusion model.

    With `trust_remote_code` the code in the checkpoint runs, as with plain transformers. Without, this project's
    own does, which computes the same.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        if getattr(config, "mask_token_id", None) is None:
            kind = ", ".join(config.architectures or [config.model_type])
            raise UserError(
                f"{checkpoint} is an autoregressive model ({kind} without a mask_token_id), which transformers' "
                "generate() continues; expected a masked diffusion model written by `python -m tools.export`, "
                "or one of others by `python -m tools.import_checkpoint`"
            )
        if trust_remote_code:
            model = AutoModelForMaskedLM.from_pretrained(checkpoint, trust_remote_code=True)
        else:
            model = diffusion_class(type(config)).from_pretrained(checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{checkpoint} cannot be loaded: {why(error)}") from None
    if not config.mask_token_id < model.get_input_embeddings().weight.shape[0]:
        rows = model.get_input_embeddings().weight.shape[0]
        raise UserError(f"{checkpoint}: mask_token_id is {config.mask_token_id}, the vocabulary has 0 to {rows - 1}")
    if not hasattr(model, "diffusion_states"):
        raise UserError(
            f"the code in {checkpoint} is of an older version, which takes fewer settings; leave --trust_remote_code "
            "out to use this project's, or export the checkpoint again"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().to(device), tokenizer


def why(error: Exception) -> str:
    """The first line of an error of another library, whose messages may be long or empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def padded_left(rows: Sequence[Sequence[int]], padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), (B, L): rows of any lengths, with padding before them."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in rows])
    real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, real


def gap_lengths(text: str) -> list[int]:
    """The n of each [MASK:n]. Raises UserError for one that is no length."""
    found = GAP.findall(text)
    for digits in found:
        if len(digits) > 9:
            raise UserError(f"[MASK:{digits[:12]}…] asks for more tokens than any text has")
    return [int(digits) for digits in found]


def encode(text: str, tokenizer: Any, mask_token_id: int, start_token_id: int | None, shift: bool = True) -> list[int]:
    """Ids of a text with [MASK:n] gaps. What looks like a special token is text.

    With the shift nothing predicts a first token, so a gap at the front gets the start token before it. Raises
    UserError where there is none.
    """
    parts = GAP.split(text)  # text, n, text, n, ..., text
    gap_lengths(text)
    numbered = [int(part) if i % 2 else part for i, part in enumerate(parts)]
    return encode_parts(numbered, tokenizer, mask_token_id, start_token_id, shift)


def encode_parts(
    parts: Sequence[str | int], tokenizer: Any, mask_token_id: int, start_token_id: int | None, shift: bool = True
) -> list[int]:
    """As `encode`, of texts and, for a gap, its number of tokens."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids += [mask_token_id] * part
        elif part and not ids:
            ids += tokenizer(part, split_special_tokens=True)["input_ids"]
            if len(ids) > 1 and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
                ids.pop()  # a tokenizer that ends texts by itself
        elif part:
            ids += continuation(part, tokenizer)
    if shift and (not ids or ids[0] == mask_token_id):
        if start_token_id is None:
            raise UserError("the text begins with a gap, and the checkpoint names no start token; begin with a word")
        ids.insert(0, start_token_id)
    return ids


def continuation(text: str, tokenizer: Any) -> list[int]:
    """Ids of text in the middle: sentencepiece tokenizers put a space before a text on its own."""
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    before = tokenizer("\n", **plain)["input_ids"]
    joined = tokenizer("\n" + text, **plain)["input_ids"]
    if joined[: len(before)] == before:
        return joined[len(before) :]
    return tokenizer(text, **plain)["input_ids"]


def pieces(ids: Sequence[int], tokenizer: Any, unknown: int | None = None) -> list[str]:
    """The text of each token, so that they join to the decoded text; special tokens are "".

    The token `unknown` gives "░". A character of several tokens stands where its last one does.
    """
    special = set(tokenizer.all_special_ids) - {unknown}

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    anchor = tokenizer("\n", add_special_tokens=False)["input_ids"]  # keeps the space before a first word
    base = decode(anchor)
    found: list[str] = []
    run, said = list(anchor), base
    for token, after in zip(ids, [*ids[1:], None]):
        if token == unknown or token in special:
            found.append("░" if token == unknown else "")
            run, said = list(anchor), base
            continue
        run.append(token)
        text = decode(run)
        ends = after is None or after == unknown or after in special
        whole = ends or not text.endswith("\N{REPLACEMENT CHARACTER}")  # else the rest of a character is to come
        found.append(text[len(said) :] if whole else "")
        if whole:
            run, said = run[-4:], decode(run[-4:])
    return found


@dataclass(frozen=True)
class Request:
    """A text to fill: `ids` with masks, and the number of the sample among those of the same text."""

    text: str
    ids: list[int]
    sample: int = 0

    def generator(self, seed: int) -> torch.Generator:
        """Its own random numbers: of the seed, the text and the sample, whatever else is in the batch."""
        key = hashlib.sha256(f"{seed}\n{self.sample}\n{self.text}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def request(text: str, model: Any, tokenizer: Any, sample: int = 0) -> Request:
    """Raises UserError for a text without a gap, one too long, or one that begins with a gap that nothing predicts."""
    about = getattr(model.config, "diffusion", None) or {}
    start = about.get("start_token_id", tokenizer.bos_token_id)
    limit = getattr(model.config, "max_position_embeddings", None)
    wanted = sum(gap_lengths(text))
    if wanted == 0:
        raise UserError(f"nothing to find in {_short(text)}: expected a gap such as [MASK:8]")
    if limit and wanted > limit:
        raise UserError(f"{wanted} tokens in gaps, but the model takes {limit}")
    ids = encode(text, tokenizer, model.config.mask_token_id, start, uses_shift(model.config))
    if limit and len(ids) > limit:
        raise UserError(f"{len(ids)} tokens with the gaps, but the model takes {limit}")
    return Request(text, ids, sample)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


@dataclass(frozen=True)
class Completion:
    """A filled text, and what it took. `seconds` are those of its whole batch."""

    request: Request
    text: str
    nfe: int
    tokens_per_forward: float
    seconds: float


def complete_all(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    seed: int,
    batch_size: int,
    settings: SamplingSettings,
    ignore_eos: bool = False,
) -> Iterator[list[Completion]]:
    """The completions of the requests, a batch at a time and in their order.

    With `ignore_eos` no end-of-text token ends a text.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ends = {"eos_token_id": -1} if ignore_eos else {}
    for begin in range(0, len(requests), batch_size):
        batch = requests[begin : begin + batch_size]
        ids, real = (part.to(model.device) for part in padded_left([r.ids for r in batch], pad))
        began = time.perf_counter()
        out = model.diffusion_generate(
            ids,
            attention_mask=real,
            generator=[r.generator(seed) for r in batch],
            return_dict_in_generate=True,
            **vars(settings),
            **ends,
        )
        seconds = time.perf_counter() - began
        texts = [tokenizer.decode(row[keep.bool()], skip_special_tokens=True) for row, keep in zip(out.sequences, real)]
        counts = zip(batch, texts, out.nfe.tolist(), out.tokens_per_forward.tolist(), strict=True)
        yield [Completion(r, text, nfe, per_forward, seconds) for r, text, nfe, per_forward in counts]


def settings_of(model: Any, given: dict[str, Any]) -> SamplingSettings:
    """The settings given, and for the others the checkpoint's defaults. Raises UserError for bad ones.

    0 steps, a block of 0 or the cache "none" stand for none, whatever the defaults.
    """
    chosen = dict(given)
    for name, none in (("steps", 0), ("block_length", 0), ("top_k", 0), ("refresh_every", 0), ("cache", "none")):
        if chosen.get(name) == none:
            chosen[name] = None
    try:
        return settings_from(getattr(model, "generation_config", None), chosen)
    except ValueError as error:
        raise UserError(str(error)) from None
