"""Texts to token ids, exactly as `tokenizer.encode` gives them, by the fastest engine that proves it.

In: a tokenizer, batches of texts. Out: ids of a batch, end to end, and the number of ids of each text.
Two engines: the reference, Hugging Face `tokenizers` (or sentencepiece behind a slow tokenizer), and
`gigatoken`, some ten times faster. `auto` uses gigatoken after it gave the reference's ids on a battery
of adversarial strings and a sample of the corpus, and compares a sample of documents all along the run.

The tokenizer's fingerprint stands in the manifest and is computed again by the trainer, so that shards
are never read with another vocabulary.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import tokenizers

from common.errors import UserError

Encoded = tuple[np.ndarray, np.ndarray]  # ids (tokens,) uint32 or int64, end to end; lengths (texts,) int64


def load_tokenizer(name: str, revision: str = "main"):
    """AutoTokenizer, with an error that says what to do. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # transformers raises many kinds; all mean that there is no tokenizer
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"no tokenizer could be loaded from {name!r}: {reason}") from error


def fingerprint(tokenizer) -> str:
    """sha256 of what decides a document's ids: vocabulary, merges, normaliser, pre-tokeniser, added tokens.

    Padding and truncation settings do not enter, nor does an added mask token: a diffusion model's
    tokenizer reads documents as its base's does.
    """
    return _fingerprint(tokenizer, tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else "")


def _fingerprint(tokenizer, backend: str) -> str:
    if backend:
        state = json.loads(backend)
        state.pop("padding", None)
        state.pop("truncation", None)
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] != tokenizer.mask_token]
    else:
        state = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    return hashlib.sha256(json.dumps(state, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


@dataclass(frozen=True)
class Recipe:
    """All that workers need of a tokenizer: loading it there again would import transformers and torch.

    Two recipes are equal when their fingerprints are.
    """

    fingerprint: str
    name: str = field(compare=False)
    revision: str = field(compare=False)
    state: str = field(compare=False)  # the fast tokenizer as JSON; empty: a slow one, loaded by name
    size: int = field(compare=False)  # ids below it
    special_ids: dict[str, int | None] = field(compare=False)  # bos, eos, pad
    special_tokens: tuple[str, ...] = field(compare=False)


def recipe_of(tokenizer, name: str = "", revision: str = "main") -> Recipe:
    """The recipe of a tokenizer of transformers, which came from `name`."""
    state = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
    return Recipe(
        _fingerprint(tokenizer, state),
        name,
        revision,
        state,
        len(tokenizer),
        {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id},
        tuple(token for token in tokenizer.all_special_tokens if token),
    )


class Reference:
    """Hugging Face's own ids: `tokenizer.encode(text, add_special_tokens=False)`."""

    name = "tokenizers"

    def __init__(self, recipe: Recipe):
        self._slow = self._fast = None
        if recipe.state:
            self._fast = tokenizers.Tokenizer.from_str(recipe.state)
            self._fast.no_truncation()
            self._fast.no_padding()
        else:
            self._slow = load_tokenizer(recipe.name, recipe.revision)
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
    """The same ids by gigatoken. Raises ImportError where it is not installed, ValueError where it cannot.

    It wants every single byte in a byte-level vocabulary. Some lack a few control characters, which
    `tokenizers` then drops; such bytes are added here to let it start, and texts that hold one are left
    to the reference.
    """

    name = "gigatoken"

    def __init__(self, recipe: Recipe, parallel: bool = True):
        import gigatoken

        if not recipe.state:
            raise ValueError("it reads tokenizer.json only")
        state = json.loads(recipe.state)
        missing = _missing_bytes(state)
        vocabulary = state["model"].get("vocab")
        if missing:
            first = max(recipe.size, *(i + 1 for i in vocabulary.values()))
            vocabulary |= {character: first + n for n, character in enumerate(missing.values())}
        # bytes above 0x7f stand in multi-byte characters only, and all of those are looked at
        self._odd = re.compile("|".join(re.escape(chr(byte)) for byte in missing if byte < 0x80)) if missing else None
        self._odd_high = {byte for byte in missing if byte >= 0x80}
        self._tokenizer = gigatoken.Tokenizer.from_json(json.dumps(state))
        self.reference, self._parallel = Reference(recipe), parallel
        self.version = _version("gigatoken-cachefix") or _version("gigatoken")

    def encode(self, texts: list[str]) -> Encoded:
        odd = [i for i, text in enumerate(texts) if self._is_odd(text)] if self._odd or self._odd_high else []
        rows = self._tokenizer.encode_batch(texts, parallel=self._parallel).layout
        offsets = np.asarray(rows.offsets.data)
        ids, lengths = np.asarray(rows.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)
        if not odd:
            return ids, lengths
        pieces = np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1])
        for i in odd:
            pieces[i] = self.reference.encode([texts[i]])[0]
        return np.concatenate(pieces), np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))

    def _is_odd(self, text: str) -> bool:
        if self._odd is not None and self._odd.search(text):
            return True
        return bool(self._odd_high) and not text.isascii() and not self._odd_high.isdisjoint(text.encode())


def _missing_bytes(state: dict) -> dict[int, str]:
    """Bytes that a byte-level BPE has no token for, each with the character that stands for it in the vocabulary."""
    parts = [state.get("pre_tokenizer") or {}]
    parts += parts[0].get("pretokenizers", [])
    if not any(part.get("type") == "ByteLevel" for part in parts):
        return {}
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}  # in no UTF-8 text; wanted all the same
    vocabulary = state["model"]["vocab"]
    missing = {byte: character for byte, character in _byte_characters().items() if character not in vocabulary}
    return {byte: missing[byte] for byte in sorted(missing, key=lambda byte: (byte in never, byte))}


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character of each byte: itself where printable, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def make_engine(recipe: Recipe, requested: str, sample: list[str], parallel: bool = True):
    """(engine, one line on why) for `engine: auto | tokenizers | gigatoken`.

    `sample`: texts of the corpus on which gigatoken must prove itself, beside the battery.
    Raises UserError when gigatoken is asked for and cannot be used.
    """
    if requested == "tokenizers":
        return Reference(recipe), "as configured"
    try:
        engine = Gigatoken(recipe, parallel)
        texts = battery(recipe) + sample
        problem = difference(engine, engine.reference, texts)
    except ImportError:
        problem = "it is not installed (pip install gigatoken-cachefix)"
    except ValueError as error:
        problem = str(error).splitlines()[0]
    if problem is None:
        return engine, f"the reference's ids on {len(texts):,} strings"
    if requested == "gigatoken":
        raise UserError(f"engine is gigatoken, but {problem}; use engine=auto or engine=tokenizers")
    return Reference(recipe), f"gigatoken is not used: {problem}"


def difference(engine, reference: Reference, texts: list[str]) -> str | None:
    """The first text on which two engines differ, described; None where there is none."""
    (a, a_lengths), (b, b_lengths) = engine.encode(texts), reference.encode(texts)
    if np.array_equal(a_lengths, b_lengths) and np.array_equal(a, b):
        return None
    a_rows, b_rows = (np.split(ids, np.cumsum(lengths)[:-1]) for ids, lengths in ((a, a_lengths), (b, b_lengths)))
    for text, x, y in zip(texts, a_rows, b_rows):
        if not np.array_equal(x, y):
            return f"its ids differ from those of tokenizers on {text[:60]!r}"
    return None


# Where a text may be cut so that its parts' ids, end to end, are its own. The matched characters are dropped.
CUTS = (
    # GPT-2's and its successors' pre-tokenizers: a word begins with its space, a lone newline ends what is before it
    re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\S\n)(?=[^\W\d_])"),
    # LLaMA-2's tokenizer puts a space before every text
    re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])"),
)


def find_cut(recipe: Recipe) -> re.Pattern | None:
    """The first of CUTS that proves itself on adversarial strings, cut wherever it allows; None: texts stay whole."""
    reference, rng = Reference(recipe), random.Random(0)
    strings, words = battery(recipe, 600), ["aZ", "the", "I", "xyz", "tion", "été", "本", "."]
    texts = [
        "".join(rng.choice(strings)[:200] + rng.choice(words) + rng.choice(" \n") + rng.choice(words) for _ in range(4))
        for _ in range(400)
    ]
    added = [token["content"] for token in json.loads(recipe.state)["added_tokens"]] if recipe.state else []
    whole, _ = reference.encode(texts)
    for cut in CUTS:
        parts = [part for text in texts for part in cut_text(iter([text]), cut, 1)]
        if np.array_equal(whole, reference.encode(parts)[0]) and not any(cut.search(token) for token in added):
            return cut
    return None


def cut_text(blocks: Iterator[str], cut: re.Pattern | None, size: int) -> Iterator[str]:
    """The text of `blocks` in parts of `size` characters, or as many more as there are up to a place of `cut`."""
    rest, searched = "", size
    for block in blocks:
        rest += block
        while cut is not None and (found := cut.search(rest, searched)):
            yield rest[: found.start()]
            rest, searched = rest[found.end() :], size
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


def battery(recipe: Recipe, count: int = 1500) -> list[str]:
    """Adversarial strings, the same at each call: joined fragments, random unicode, long runs, special tokens."""
    rng = random.Random(20241017)
    specials = list(recipe.special_tokens)
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
