"""Texts to token ids, exactly as `tokenizer.encode` gives them, with the fastest engine that does so.

In: a tokenizer and batches of texts. Out: the ids of a batch, end to end, and the number of ids of each text.
Two engines: the reference, Hugging Face `tokenizers` (or sentencepiece behind a slow tokenizer), and
`gigatoken`, some ten times faster. `auto` uses gigatoken if it gives the reference's ids on adversarial
texts and on a sample of the corpus; during the run a sample of the documents is compared as well.

The manifest holds the tokenizer's fingerprint. The trainer computes it again and refuses shards that were
made with another tokenizer.
"""

import hashlib
import json
import random
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from common.errors import UserError

if TYPE_CHECKING:  # importing transformers takes seconds, and workers do not need it
    from transformers import PreTrainedTokenizerBase

Encoded = tuple[np.ndarray, np.ndarray]  # ids (tokens,) uint32 or int64, end to end; lengths (texts,) int64


def load_tokenizer(name: str, revision: str = "main") -> "PreTrainedTokenizerBase":
    """AutoTokenizer.from_pretrained; raises UserError, whatever the reason that there is no tokenizer."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # transformers raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"no tokenizer could be loaded from {name!r}: {reason}") from error


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 of what decides a document's ids: vocabulary, merges, normalizer, pre-tokenizer, added tokens.

    Padding and truncation settings are left out, and so is an added mask token: a diffusion model's
    tokenizer gives a document the same ids as its base's.
    """
    return _fingerprint(tokenizer, _fast_state(tokenizer))


def check_same(tokenizer: "PreTrainedTokenizerBase", of_corpus: dict[str, Any], corpus: str, owner: str) -> None:
    """Raise UserError where `corpus`, whose manifest says `of_corpus` of its tokenizer, was made with another one.

    `owner` is whose tokenizer this is, such as a checkpoint.
    """
    found, expected = fingerprint(tokenizer), of_corpus["fingerprint"]
    if found != expected:
        raise UserError(
            f"{corpus} was tokenised with {of_corpus['name']!r} (fingerprint {expected[:12]}…), but {owner} has "
            f"another tokenizer ({found[:12]}…); prepare the corpus with that one"
        )


def _fast_state(tokenizer: Any) -> str:
    """A fast tokenizer as JSON; empty for a slow one."""
    return tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""


def _fingerprint(tokenizer: "PreTrainedTokenizerBase", backend: str) -> str:
    if backend:
        state = json.loads(backend)
        state.pop("padding", None)
        state.pop("truncation", None)
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] != tokenizer.mask_token]
    else:
        state = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    return hashlib.sha256(json.dumps(state, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


@dataclass(frozen=True)
class TokenizerSpec:
    """What a worker needs to know of a tokenizer, so that it need not import transformers and torch.

    Two are equal when they give a document the same ids.
    """

    fingerprint: str
    name: str = field(compare=False)
    revision: str = field(compare=False)
    state: str = field(compare=False)  # the fast tokenizer as JSON; empty: a slow one, loaded by name
    size: int = field(compare=False)  # the largest id, and 1; there may be fewer tokens
    special_ids: dict[str, int | None] = field(compare=False)  # bos, eos, pad
    special_tokens: tuple[str, ...] = field(compare=False)
    special_in_text: str = "special"  # what "</s>" in a document is: `special`, that id; else text
    separator: int | None = None  # the id that ends a document


def spec_of(
    tokenizer: "PreTrainedTokenizerBase",
    name: str = "",
    revision: str = "main",
    special_in_text: str = "special",
    separator: int | None = None,
) -> TokenizerSpec:
    """The spec of a tokenizer that transformers loaded from `name`."""
    state = _fast_state(tokenizer)
    special = {token["content"] for token in json.loads(state)["added_tokens"] if token["special"]} if state else set()
    special_ids: dict[str, Any] = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return TokenizerSpec(
        fingerprint=_fingerprint(tokenizer, state),
        name=name,
        revision=revision,
        state=state,
        size=1 + max(tokenizer.get_vocab().values()),
        special_ids=special_ids,
        special_tokens=tuple(sorted(special.union(token for token in tokenizer.all_special_tokens if token))),
        special_in_text=special_in_text,
        separator=separator,
    )


class SpecialTokens:
    """Finds special tokens in texts, such as the </s> that strikes a word through in HTML."""

    def __init__(self, spec: TokenizerSpec):
        longest_first = sorted(spec.special_tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        firsts = {token[0] for token in longest_first}
        self._first = firsts.pop() if len(firsts) == 1 else ""  # looked for at first, which is faster

    def in_text(self, text: str) -> set[str]:
        return set(self._pattern.findall(text)) if self._first in text else set()


class Reference:
    """Hugging Face's own ids: `tokenizer.encode(text, add_special_tokens=False)`.

    With split_special_tokens=True, unless the spec wants special tokens in texts to be special.
    """

    name = "tokenizers"

    def __init__(self, spec: TokenizerSpec):
        self._fast: Any = None
        self._slow: Any = None
        if spec.state:
            self._fast = tokenizers.Tokenizer.from_str(spec.state)
            self._fast.no_truncation()
            self._fast.no_padding()
            self._fast.encode_special_tokens = spec.special_in_text != "special"
        else:
            self._slow = load_tokenizer(spec.name, spec.revision)
        self._split = spec.special_in_text != "special"
        self.version = tokenizers.__version__

    def encode(self, texts: list[str]) -> Encoded:
        if self._fast:
            rows = [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            rows = [
                self._slow.encode(text, add_special_tokens=False, split_special_tokens=self._split) for text in texts
            ]
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        ids = np.fromiter((i for row in rows for i in row), dtype=np.int64, count=int(lengths.sum()))
        return ids, lengths


# fmt: off
FRAGMENTS = [
    "the", " The", "tion", "'s", "'LL", " don't", "naïve", " Straße", "。本", "、", "！", "λόγος",
    " Привет", "ти", "日本語", "한국어", "\U00031350", "\U0001133b", "\U000e0000",
    " العربية", "हिन्दी", "ไทย", "👩\u200d👧", "🇫🇷", "é", "e\u0301", "\u200d", "\u00a0", "\ufeff", "\u2028", "\u3000",
    "ﬁ", "½", "Ⅷ", "𝔘", " ", "  ", "    ", "\t", "\n", "\r\n", "\n\n\n", " \n ", "\x0b", "\x0c", "\x00", "\x04", "\x1f",
    "\x7f", "\x85", "0", "12", "345", "6789", "3.14", "1,000", "0x1F", "٣", "²", "a1b2", "_", "__init__", "self.",
    "!=", "->", "//", "/*", "def f(x):", "{\n\t", "<div>", "</s>", "<s>", "<unk>", "<|endoftext|>", "<|im_start|>",
    "▁", "Ġ", "<0x41>", "%s", "\\n",
]
# fmt: on


def adversarial_texts(spec: TokenizerSpec, count: int = 1500) -> list[str]:
    """Hard texts, the same at each call: joined fragments, random unicode, long runs, special tokens."""
    rng = random.Random(20241017)
    specials = list(spec.special_tokens)
    fragments = FRAGMENTS + specials + [s[:-1] for s in specials] + [" " + s for s in specials]
    texts = ["", *fragments, *(a + b for a in specials for b in fragments)]
    for _ in range(count):
        kind = rng.random()
        if kind < 0.6:
            texts.append("".join(rng.choices(fragments, k=rng.randint(1, 12))))
        elif kind < 0.8:
            points = (
                rng.choice((rng.randint(0, 0x7F), rng.randint(0, 0x2FFF), rng.randint(0x10000, 0x1FFFF)))
                for _ in range(20)
            )
            texts.append("".join(chr(p) for p in points))
        else:
            texts.append(rng.choice(fragments) * rng.randint(2, 60))
    return [*texts, "a" * 20_000, " " * 20_000, "\n" * 5_000, "ab " * 10_000, "é" * 5_000]


def byte_characters() -> dict[int, str]:
    """GPT-2's printable character of each byte: itself where printable, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
