"""The documents of one unit of work.

In: a unit of the work list. Out: `read(unit, ...)`, the texts in file order. A line of JSONL, a row of
Parquet or Arrow, or a whole text file is one document. What cannot be used is counted by reason.
"""

import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from common.errors import UserError, without_passwords

from .config import SourceConfig
from .inputs.columns import read_arrow, read_parquet
from .inputs.document import TOO_LONG, Document, LongText, Tally
from .inputs.files import ReadFailed, describe
from .inputs.filters import Test, call_hook, compile_filters, load_hook, value_at
from .inputs.listing import kind
from .inputs.text import read_jsonl, read_txt
from .work_list import Unit

# What bytes that are damaged or cut off raise. OSError is Arrow's and bz2's; that of a file system is ReadFailed.
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException, UnicodeDecodeError)
UNLIMITED = sys.maxsize


def read(unit: Unit, source: SourceConfig, tally: Tally, max_bytes: int = UNLIMITED) -> Iterator[Document]:
    """Yield the unit's documents that pass the source's filters, in order; count the others.

    A file that is cut off or damaged gives what could be read, and is named in `tally.damaged` with the reason. A line
    of JSONL, or a text of a column, of more than `max_bytes` is bad; a text file may have any length, unless a hook
    has to see it. Raises ReadFailed for a file that could not be read for another reason, and UserError for one
    that is gone, a column that is not there, or a hook that fails.
    """
    readers = {"jsonl": read_jsonl, "txt": read_txt, "parquet": read_parquet, "arrow": read_arrow}
    is_wanted = _selector(source, tally, max_bytes)
    for path in (file.path for file in unit.files):
        try:
            for text, record in readers[kind(path)](path, unit, source, tally, max_bytes):
                if is_wanted(text, record, path):
                    yield text
        except FileNotFoundError:
            raise UserError(f"{path} is gone; it was there when the work list was made") from None
        except (ReadFailed, MemoryError):
            raise
        except DAMAGE as error:
            tally.damaged.append(f"{without_passwords(path)}: {describe(error)}")


def _selector(source: SourceConfig, tally: Tally, max_bytes: int) -> Callable[[Any, dict, str], bool]:
    """Whether a text, with its record and file, is usable and passes the source's filters; if not, why is counted."""
    tests = compile_filters(source.filters)
    hook = load_hook(source.filter) if source.filter else None

    def is_wanted(text: Any, record: dict, path: str) -> bool:
        if not isinstance(text, str | LongText):
            tally.bad["text is not a string"] += 1
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
    if not len(text) or (isinstance(text, str) and text.isspace()):
        return "empty"
    if len(text) < source.min_characters:
        return f"shorter than {source.min_characters} characters"
    failed = next((key for key, test in tests.items() if not test(value_at(record, key))), None)
    return None if failed is None else f"{failed} is not wanted"
