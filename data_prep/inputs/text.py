"""The documents of JSONL and text files.

A byte order mark at the start of a file is no part of its first document.

Memory: a line of JSONL takes about three times its size while it is parsed, six times if it has a character beyond
U+FFFF; one beyond the limit takes no more than the limit. Of a text file BLOCK_BYTES are in memory.
"""

import codecs
import hashlib
import json
from typing import Any, BinaryIO

import orjson

from ..config import SourceConfig
from ..work_list import Unit
from .document import BLOCK_BYTES, TOO_LONG, Found, LongText, Tally
from .files import open_decompressed
from .filters import value_at

LONG_FILE_BYTES = 1 << 24  # larger text files are never in memory as a whole
LINE_BYTES = 1 << 20  # longer lines are read in parts
_MISSING = object()


def read_jsonl(path: str, unit: Unit, source: SourceConfig, tally: Tally, max_bytes: int) -> Found:
    """One record a line. A line of more than `max_bytes` is counted as bad, and never in memory as a whole."""
    with open_decompressed(path) as file:
        position = unit.start
        if unit.start > 0:  # the unit before has the line that runs into this range
            file.seek(unit.start - 1)
            position += _next_line(file, 0)[1] - 1
        while not 0 <= unit.end <= position:
            line, size = _next_line(file, max_bytes)
            if not size:
                return
            if line is None:
                tally.bad[TOO_LONG] += 1
                position += size
                continue
            if position == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            position += size
            if not line or line.isspace():
                continue
            text, record, problem = _parse(line, source.text_field)
            del line  # a long one need not be in memory beside its text
            if problem:
                tally.bad[problem] += 1
            else:
                yield text, record


def _next_line(file: BinaryIO, max_bytes: int) -> tuple[bytes | bytearray | None, int]:
    """The next line, or None if it has more than `max_bytes`, and its size with its line end; 0 at the file's end."""
    line: bytes | bytearray = file.readline(LINE_BYTES)
    block = line
    size = len(line)
    if size == LINE_BYTES and not line.endswith(b"\n"):
        line = bytearray(line)  # grows in place
        while not block.endswith(b"\n") and (block := file.readline(LINE_BYTES)):
            size += len(block)
            if size <= max_bytes + 1:
                line += block
            else:
                line.clear()
    return (line if size - block.endswith(b"\n") <= max_bytes else None), size


def _parse(line: bytes | bytearray, text_field: str) -> tuple[Any, dict, str]:
    """(text, record, "") of a line, or (None, {}, why it is unusable, in words that quote nothing of it)."""
    is_strict = True
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        # Python's parser also takes NaN, huge numbers and lone surrogates, which are no harm in other fields
        is_strict = False
        try:
            record = json.loads(line.decode("utf-8"), parse_int=_parse_integer)
        except UnicodeDecodeError:
            return None, {}, "not UTF-8"
        except json.JSONDecodeError as error:
            return None, {}, f"not JSON: {error.msg.partition(':')[0]}"
        except RecursionError:
            return None, {}, "not JSON: nested too deeply"
    text = value_at(record, text_field, missing=_MISSING)
    if text is _MISSING:
        return None, {}, f"no field {text_field!r}"
    if not is_strict and isinstance(text, str) and not _is_utf8(text):
        return None, {}, "lone surrogates"
    return text, record, ""


def _parse_integer(digits: str) -> float:
    try:
        return int(digits)
    except ValueError:  # Python refuses thousands of digits
        return float(digits)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_txt(path: str, unit: Unit, source: SourceConfig, tally: Tally, max_bytes: int) -> Found:
    """One document, of any length: a long one is read in blocks, so that `max_bytes` does not bound it."""
    with open_decompressed(path) as file:
        content = file.read(LONG_FILE_BYTES + 1)
        try:
            if len(content) > LONG_FILE_BYTES:
                text: str | LongText = _scan_long_text(path, content, file)
            else:
                text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            tally.bad["not UTF-8"] += 1
            return
    yield text, {source.text_field: text}


def _scan_long_text(path: str, block: bytes, file: BinaryIO) -> LongText:
    """Read `file`, whose first bytes are `block`, to its end for length and hash. Raises UnicodeDecodeError."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    hashed = hashlib.blake2b(digest_size=16)
    characters = 0
    size = 0
    block = block.removeprefix(codecs.BOM_UTF8)
    while block:
        hashed.update(block)
        characters += len(decode(block))
        size += len(block)
        block = file.read(BLOCK_BYTES)
    decode(b"", final=True)
    return LongText(path, characters, size, hashed.digest())
