"""The documents of JSONL and text files."""

import codecs
import hashlib
from typing import BinaryIO

import orjson

from ..config import SourceConfig
from ..work_list import Unit
from .document import BLOCK_BYTES, Found, LongText, Tally
from .files import open_decompressed

LONG_FILE_BYTES = 1 << 24  # larger text files are never in memory as a whole


def read_jsonl(path: str, unit: Unit, source: SourceConfig, tally: Tally) -> Found:
    with open_decompressed(path) as file:
        position = unit.start
        if unit.start > 0:  # the unit before has the line that runs into this range
            file.seek(unit.start - 1)
            position += len(file.readline()) - 1
        for line in file:
            if 0 <= unit.end <= position:
                return
            position += len(line)
            if line.isspace():
                continue
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                tally.bad["not JSON" if _is_utf8(line) else "not UTF-8"] += 1
                continue
            if not isinstance(record, dict) or source.text_field not in record:
                tally.bad[f"no field {source.text_field!r}"] += 1
                continue
            yield record[source.text_field], record


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def read_txt(path: str, unit: Unit, source: SourceConfig, tally: Tally) -> Found:
    with open_decompressed(path) as file:
        content = file.read(LONG_FILE_BYTES + 1)
        try:
            if len(content) > LONG_FILE_BYTES:
                yield _scan_long_text(path, content, file), {}
            else:
                yield content.decode("utf-8"), {}
        except UnicodeDecodeError:
            tally.bad["not UTF-8"] += 1


def _scan_long_text(path: str, block: bytes, file: BinaryIO) -> LongText:
    """Read `file`, whose first bytes are `block`, to its end for length and hash. Raises UnicodeDecodeError."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    hashed = hashlib.blake2b(digest_size=16)
    characters = 0
    size = 0
    while block:
        hashed.update(block)
        characters += len(decode(block))
        size += len(block)
        block = file.read(BLOCK_BYTES)
    decode(b"", final=True)
    return LongText(path, characters, size, hashed.digest())
