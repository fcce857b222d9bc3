"""The documents of one unit of work.

In: a unit of the work list. Out: `read(unit, ...)`, the documents in file order. A line of JSONL, a row of
Parquet or Arrow, a whole text file, or a record of a token file is one document. What cannot be
used is counted by reason.
"""

import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from common.errors import UserError, without_passwords

from .config import PrepareConfig, SourceConfig
from .imported import Decoder
from .inputs.columns import read_arrow, read_parquet
from .inputs.document import TOO_LONG, Document, Found, LongText, Tally, TokenizedText, text_of
from .inputs.files import ReadFailed, describe
from .inputs.filters import Test, call_hook, compile_filters, load_hook, value_at
from .inputs.listing import kind
from .inputs.text import read_jsonl, read_txt
from .inputs.tokens import TOKEN_KINDS, TOO_LONG_RECORD, is_tokenized, read_tokens, split_at
from .tokenizing import TokenizerSpec
from .work_list import Unit

# What bytes that are damaged or cut off raise. OSError is Arrow's and bz2's; that of a file system is ReadFailed.
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException, UnicodeDecodeError)
UNLIMITED = sys.maxsize


def read(
    unit: Unit, source: SourceConfig, tally: Tally, max_bytes: int = UNLIMITED, decoder: Decoder | None = None
) -> Iterator[Document]:
    """Yield the unit's documents that pass the source's filters, in order; count the others.

    A file that is cut off or damaged gives what could be read, and is named in `tally.damaged` with the reason. A line
    of JSONL, or a text of a column, of more than `max_bytes` is bad; a text file may have any length, unless a hook
    has to see it. Token ids become documents by `decoder`. Raises ReadFailed for a file that could not be read for
    another reason, and UserError for one that is gone, a column that is not there, an id outside the vocabulary, or
    a hook that fails.
    """
    readers = {"jsonl": read_jsonl, "txt": read_txt, "parquet": read_parquet, "arrow": read_arrow}
    is_wanted = _selector(source, tally, max_bytes)
    for path in (file.path for file in unit.files):
        try:
            if is_tokenized(source, path):
                found = _tokenized(path, unit, source, tally, max_bytes, decoder)
            else:
                found = readers[kind(path)](path, unit, source, tally, max_bytes)
            for text, record in found:
                if is_wanted(text, record, path):
                    yield text
        except FileNotFoundError:
            raise UserError(f"{path} is gone; it was there when the work list was made") from None
        except (ReadFailed, MemoryError):
            raise
        except DAMAGE as error:
            tally.damaged.append(f"{without_passwords(path)}: {describe(error)}")


def of_unit(unit: Unit, config: PrepareConfig, tokenizer: TokenizerSpec, tally: Tally) -> Iterator[Document]:
    """`read` with what the configuration says of the unit's source."""
    source = next(source for source in config.sources if source.name == unit.source)
    ends = frozenset(i for i in (tokenizer.special_ids["eos"], tokenizer.separator) if i is not None)
    decoder = Decoder(tokenizer, tokenizer.special_ids["bos"], ends)
    return read(unit, source, tally, config.max_document_mb << 20, decoder)


def has_ids(unit: Unit, config: PrepareConfig) -> bool:
    """Whether the unit's files hold token ids, and not texts."""
    source = next(source for source in config.sources if source.name == unit.source)
    return any(is_tokenized(source, file.path) for file in unit.files)


def check_files(source: SourceConfig, paths: Sequence[str]) -> None:
    """Raise UserError for texts beside token files, and for filters on records without columns: none would pass."""
    if len({is_tokenized(source, path) for path in paths}) > 1:
        raise UserError(f"source {source.name} has texts and token files in one folder; make two sources of them")
    if not (source.filters or source.filter):
        return
    setting = "filters" if source.filters else "filter"
    if source.boundaries == "eos":
        raise UserError(f"source {source.name}: {setting} needs a record a document, and boundaries: eos has none")
    without = next((path for path in paths if kind(path) in TOKEN_KINDS), None)
    if without:
        raise UserError(f"source {source.name}: {setting} needs columns, and {without} has token ids alone")


def _tokenized(
    path: str, unit: Unit, source: SourceConfig, tally: Tally, max_bytes: int, decoder: Decoder | None
) -> Found:
    """The records of ids of a file, as TokenizedText where they are ids."""
    if decoder is None:
        raise ValueError(f"{path} has token ids: reading them needs a decoder")
    records = read_tokens(path, unit, source, tally, max_bytes)
    if source.boundaries == "eos":
        records = split_at(records, decoder.ends)
    for number, (ids, record) in enumerate(records, unit.start):
        if ids is TOO_LONG_RECORD:
            tally.bad[TOO_LONG] += 1
            continue
        if not isinstance(ids, np.ndarray):
            yield None, record
            continue
        document = decoder.document(ids, f"{path}, document {number:,}", max_bytes)
        if document is None:
            tally.bad[TOO_LONG] += 1
        else:
            yield document, record


def _selector(source: SourceConfig, tally: Tally, max_bytes: int) -> Callable[[Any, dict, str], bool]:
    """Whether a text, with its record and file, is usable and passes the source's filters; if not, why is counted."""
    tests = compile_filters(source.filters)
    hook = load_hook(source.filter) if source.filter else None

    def is_wanted(text: Any, record: dict, path: str) -> bool:
        if not isinstance(text, str | LongText | TokenizedText):
            tally.bad["not a list of token ids" if source.tokens_field else "text is not a string"] += 1
            return False
        reason = _why_filtered(text, record, source, tests)
        if reason is None and hook is not None:
            if isinstance(text, LongText):
                if text.utf8_bytes > max_bytes:
                    tally.bad[TOO_LONG] += 1
                    return False
                record = {source.text_field: "".join(text.blocks())}
            if not call_hook(hook, source.filter, record, path):
                reason = f"hook {source.filter}"
        if reason is not None:
            tally.filtered[reason] += 1
        return reason is None

    return is_wanted


def _why_filtered(text: Document, record: dict, source: SourceConfig, tests: dict[str, Test]) -> str | None:
    if not len(text) or (not isinstance(text, LongText) and text_of(text).isspace()):
        return "empty"
    if len(text) < source.min_characters:
        return f"shorter than {source.min_characters} characters"
    failed = next((key for key, test in tests.items() if not test(value_at(record, key))), None)
    return None if failed is None else f"{failed} is not wanted"
