"""The documents of one unit of work.

In: a unit of the work list. Out: `read(unit, ...)`, the texts in file order. A line of JSONL, a row of
Parquet or Arrow, or a whole text file is one document. What cannot be used is counted by reason.
"""

from collections.abc import Iterator
from typing import Any

from common.errors import UserError

from .config import SourceConfig
from .inputs.columns import read_arrow, read_parquet
from .inputs.document import Document, LongText, Tally
from .inputs.listing import kind
from .inputs.text import read_jsonl, read_txt
from .work_list import Unit


def read(unit: Unit, source: SourceConfig, tally: Tally) -> Iterator[Document]:
    """Yield the unit's documents that pass the source's filters, in order; count the others.

    A file that is cut off or damaged gives what could be read, and is named in `tally.damaged`.
    """
    readers = {"jsonl": read_jsonl, "txt": read_txt, "parquet": read_parquet, "arrow": read_arrow}
    for path in (file.path for file in unit.files):
        try:
            for text, record in readers[kind(path)](path, unit, source, tally):
                if _is_wanted(text, record, source, tally):
                    yield text
        except FileNotFoundError:
            raise UserError(f"{path} is gone; it was there when the work list was made") from None
        except (EOFError, OSError, ValueError) as error:
            tally.bad["file damaged or cut off"] += 1
            tally.damaged.append(f"{path}: {str(error).splitlines()[0]}")


def _is_wanted(text: Any, record: dict, source: SourceConfig, tally: Tally) -> bool:
    """Whether this is a usable text that passes the source's filters; if not, the reason is counted."""
    if not isinstance(text, str | LongText):
        tally.bad["text is not a string"] += 1
        return False
    if not len(text) or (isinstance(text, str) and text.isspace()):
        tally.bad["empty"] += 1
        return False
    if len(text) < source.min_characters:
        tally.filtered[f"shorter than {source.min_characters} characters"] += 1
        return False
    for key, allowed in source.filters.items():
        if _value_at(record, key) not in allowed:
            tally.filtered[f"{key} is not wanted"] += 1
            return False
    return True


def _value_at(record: dict, key: str) -> Any:
    """The value of a key such as `meta.licence`, where dots descend into nested records."""
    found: Any = record
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found
