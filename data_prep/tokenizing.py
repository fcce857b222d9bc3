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
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
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

    Two are equal when their fingerprints are.
    """

    fingerprint: str
    name: str = field(compare=False)
    revision: str = field(compare=False)
    state: str = field(compare=False)  # the fast tokenizer as JSON; empty: a slow one, loaded by name
    size: int = field(compare=False)  # tokens in the vocabulary; every id is smaller
    special_ids: dict[str, int | None] = field(compare=False)  # bos, eos, pad
    special_tokens: tuple[str, ...] = field(compare=False)


def spec_of(tokenizer: "PreTrainedTokenizerBase", name: str = "", revision: str = "main") -> TokenizerSpec:
    """The spec of a tokenizer that transformers loaded from `name`."""
    state = _fast_state(tokenizer)
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
        size=len(tokenizer),
        special_ids=special_ids,
        special_tokens=tuple(token for token in tokenizer.all_special_tokens if token),
    )


class Reference:
    """Hugging Face's own ids: `tokenizer.encode(text, add_special_tokens=False)`."""

    name = "tokenizers"

    def __init__(self, spec: TokenizerSpec):
        self._fast: Any = None
        self._slow: Any = None
        if spec.state:
            self._fast = tokenizers.Tokenizer.from_str(spec.state)
            self._fast.no_truncation()
            self._fast.no_padding()
        else:
            self._slow = load_tokenizer(spec.name, spec.revision)
        self.version = tokenizers.__version__

    def encode(self, texts: list[str]) -> Encoded:
        if self._fast:
            rows = [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            rows = [self._slow.encode(text, add_special_tokens=False) for text in texts]
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        ids = np.fromiter((i for row in rows for i in row), dtype=np.int64, count=int(lengths.sum()))
        return ids, lengths


class Gigatoken:
    """gigatoken. Raises ImportError if it is not installed, ValueError if it cannot read the tokenizer.

    It requires a byte-level vocabulary to have a token for each of the 256 bytes. Some vocabularies lack a
    few control characters, and `tokenizers` silently drops these bytes. Here such bytes get a made-up token,
    so that gigatoken starts, and texts that contain one are encoded by the reference instead.
    """

    name = "gigatoken"

    def __init__(self, spec: TokenizerSpec, parallel: bool = True):
        import gigatoken

        if not spec.state:
            raise ValueError("it reads tokenizer.json only")
        state = json.loads(spec.state)
        missing = _missing_bytes(state)
        vocabulary = state["model"].get("vocab")
        if missing:
            first = max(spec.size, *(i + 1 for i in vocabulary.values()))
            vocabulary |= {character: first + n for n, character in enumerate(missing.values())}
        # ASCII bytes are characters of their own; the others occur only inside multi-byte characters
        self._missing_ascii = {chr(byte) for byte in missing if byte < 0x80}
        self._missing_high = {byte for byte in missing if byte >= 0x80}
        self._ascii_pattern = re.compile("|".join(map(re.escape, self._missing_ascii)))
        self._tokenizer = gigatoken.Tokenizer.from_json(json.dumps(state))
        self.reference = Reference(spec)
        self._parallel = parallel
        self.version = _installed_version("gigatoken-cachefix") or _installed_version("gigatoken")

    def encode(self, texts: list[str]) -> Encoded:
        left_out = [i for i, text in enumerate(texts) if self._has_missing_byte(text)]
        rows: Any = self._tokenizer.encode_batch(texts, parallel=self._parallel).layout
        offsets = np.asarray(rows.offsets.data)
        ids = np.asarray(rows.content.data)[offsets[0] : offsets[-1]]
        lengths = np.diff(offsets)
        if not left_out:
            return ids, lengths
        pieces = np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1])
        for i in left_out:
            pieces[i] = self.reference.encode([texts[i]])[0]
        return np.concatenate(pieces), np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))

    def _has_missing_byte(self, text: str) -> bool:
        if self._missing_ascii and self._ascii_pattern.search(text):
            return True
        return bool(self._missing_high) and not text.isascii() and not self._missing_high.isdisjoint(text.encode())


Engine = Reference | Gigatoken


def _missing_bytes(state: dict) -> dict[int, str]:
    """Bytes that a byte-level BPE has no token for, each with the character that writes it in the vocabulary."""
    parts = [state.get("pre_tokenizer") or {}]
    parts += parts[0].get("pretokenizers", [])
    if not any(part.get("type") == "ByteLevel" for part in parts):
        return {}
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}  # occur in no UTF-8 text; gigatoken requires them all the same
    vocabulary = state["model"]["vocab"]
    missing = {byte: character for byte, character in byte_characters().items() if character not in vocabulary}
    return {byte: missing[byte] for byte in sorted(missing, key=lambda byte: (byte in never, byte))}


def byte_characters() -> dict[int, str]:
    """GPT-2's printable character of each byte: itself where printable, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def select_engine(spec: TokenizerSpec, requested: str, sample: list[str], parallel: bool = True) -> tuple[Engine, str]:
    """(engine, the reason in one line) for `engine: auto | tokenizers | gigatoken`.

    gigatoken must give the reference's ids on the adversarial texts and on `sample`, texts of the corpus.
    Raises UserError when gigatoken is requested and cannot be used.
    """
    if requested == "tokenizers":
        return Reference(spec), "as configured"
    try:
        engine = Gigatoken(spec, parallel)
        texts = adversarial_texts(spec) + sample
        problem = first_difference(engine, engine.reference, texts)
    except ImportError:
        problem = "it is not installed (pip install gigatoken-cachefix)"
    except ValueError as error:
        problem = str(error).splitlines()[0]
    if problem is None:
        return engine, f"the reference's ids on {len(texts):,} strings"
    if requested == "gigatoken":
        raise UserError(f"engine is gigatoken, but {problem}; use engine=auto or engine=tokenizers")
    return Reference(spec), f"gigatoken is not used: {problem}"


def first_difference(engine: Engine, reference: Reference, texts: list[str]) -> str | None:
    """A description of the first text on which two engines differ; None where there is none."""
    found, found_lengths = engine.encode(texts)
    expected, expected_lengths = reference.encode(texts)
    if np.array_equal(found_lengths, expected_lengths) and np.array_equal(found, expected):
        return None
    found_rows = np.split(found, np.cumsum(found_lengths)[:-1])
    expected_rows = np.split(expected, np.cumsum(expected_lengths)[:-1])
    for text, row, expected_row in zip(texts, found_rows, expected_rows):
        if not np.array_equal(row, expected_row):
            return f"its ids differ from those of tokenizers on {text[:60]!r}"
    return None


# Places where a long text may be cut into parts that are tokenized one by one: the ids of the parts, end to
# end, must be the ids of the whole. The matched characters themselves are dropped.
CUT_PATTERNS = (
    # GPT-2's and its successors' pre-tokenizers: a word begins with its space, and a lone newline ends a chunk
    re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\S\n)(?=[^\W\d_])"),
    # LLaMA-2's tokenizer puts a space before every text, so the space of the cut is dropped
    re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])"),
)


def find_cut_pattern(spec: TokenizerSpec) -> re.Pattern | None:
    """The first of CUT_PATTERNS that keeps the ids of adversarial texts, cut wherever it matches; None if none does."""
    reference = Reference(spec)
    rng = random.Random(0)
    strings = adversarial_texts(spec, 600)
    words = ["aZ", "the", "I", "xyz", "tion", "été", "本", "."]
    texts = [
        "".join(rng.choice(strings)[:200] + rng.choice(words) + rng.choice(" \n") + rng.choice(words) for _ in range(4))
        for _ in range(400)
    ]
    added = [token["content"] for token in json.loads(spec.state)["added_tokens"]] if spec.state else []
    whole, _ = reference.encode(texts)
    for pattern in CUT_PATTERNS:
        parts = [part for text in texts for part in cut_text(iter([text]), pattern, 1)]
        cuts_a_token = any(pattern.search(token) for token in added)
        if not cuts_a_token and np.array_equal(whole, reference.encode(parts)[0]):
            return pattern
    return None


def cut_text(blocks: Iterator[str], pattern: re.Pattern | None, size: int) -> Iterator[str]:
    """The text of `blocks` in parts of at least `size` characters, each cut at the next match of `pattern`.

    Without a pattern the text comes as one part.
    """
    rest = ""
    searched = size  # there is no match before this position of `rest`
    for block in blocks:
        rest += block
        while pattern is not None and (found := pattern.search(rest, searched)):
            yield rest[: found.start()]
            rest = rest[found.end() :]
            searched = size
        searched = max(size, len(rest) - 2)
    if rest:
        yield rest


# fmt: off
FRAGMENTS = [
    "the", " The", "tion", "'s", "'LL", " don't", "naïve", " Straße", "λόγος", " Привет", "ти", "日本語", "한국어",
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
