"""The engines that tokenize: the reference, and gigatoken where it gives the same ids."""

import json
import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError

from .tokenizing import Encoded, Reference, SpecialTokens, TokenizerSpec, adversarial_texts, byte_characters


class Gigatoken:
    """gigatoken. Raises ImportError if it is not installed, any other exception if it cannot read the tokenizer.

    Texts go to the reference where gigatoken is known to differ: those with code points that Unicode 14, which it
    knows, has not assigned, and those with special tokens that are to be text.

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
        self._special = SpecialTokens(spec) if spec.special_in_text != "special" else None
        self._parallel = parallel
        self.version = _installed_version("gigatoken-cachefix") or _installed_version("gigatoken")

    def encode(self, texts: list[str]) -> Encoded:
        left_out = [i for i, text in enumerate(texts) if self._may_differ(text)]
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

    def _may_differ(self, text: str) -> bool:
        if self._missing_ascii and self._ascii_pattern.search(text):
            return True
        if self._special and self._special.in_text(text):
            return True
        if text.isascii():
            return False
        if _has_unassigned(text):
            return True
        return bool(self._missing_high) and not self._missing_high.isdisjoint(text.encode())


@lru_cache(maxsize=1)
def unassigned() -> np.ndarray:
    """(0x110000,) bool: the code points that Unicode 14 has not assigned.

    Kept as a file, as Python's own unicodedata grows with its version:
    " ".join(f"{p:X}" for p in range(0x110000) if unicodedata.category(chr(p)) == "Cn"), neighbours as FIRST-LAST.
    """
    table = np.zeros(0x110000, dtype=bool)
    for span in (Path(__file__).parent / "unassigned_unicode_14.txt").read_text(encoding="ascii").split():
        first, _, last = span.partition("-")
        table[int(first, 16) : int(last or first, 16) + 1] = True
    return table


def _has_unassigned(text: str) -> bool:
    # A pattern would compare each character with hundreds of ranges
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return bool(unassigned()[points].any())


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


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


Engine = Reference | Gigatoken


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
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # of any kind: a panic of its Rust code is no Exception
        problem = f"{error or type(error).__name__}".splitlines()[0]
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
