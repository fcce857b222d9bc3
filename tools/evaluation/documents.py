"""The examples of a task: from a local file, or from the Hub, checked before any model is loaded."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError

from ..decoding import why

SUFFIXES = (".jsonl", ".jsonl.gz")


def find_file(data_dir: str | Path, names: Sequence[str]) -> Path | None:
    """The file in `data_dir` whose name begins with the first of `names` that any begins with; None: there is none.

    Capitals, `-` and `_` do not count. Raises UserError where several begin with it.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"--data_dir {data_dir} is no folder")
    files = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES))
    for name in names:
        found = [path for path in files if plain(path.name).startswith(plain(name))]
        exact = [path for path in found if plain(path.name.split(".jsonl")[0]) == plain(name)]
        if len(exact or found) > 1:
            listed = ", ".join(path.name for path in found)
            raise UserError(f"{folder} has several files for {name}: {listed}; keep one of them there")
        if found:
            return (exact or found)[0]
    return None


def plain(name: str) -> str:
    """A file's name without what differs between publishers."""
    return name.lower().replace("-", "").replace("_", "")


def read_records(path: Path, fields: Sequence[str]) -> list[dict]:
    """The JSON objects of a file. Raises UserError that names the line of one that is damaged or lacks a field."""
    records = []
    try:
        opened: Any = gzip.open if path.name.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    records.append(_record(line, fields, f"{path}:{number}"))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not records:
        raise UserError(f"{path} holds no examples")
    return records


def _record(line: str, fields: Sequence[str], place: str) -> dict:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is no JSON: {error}") from None
    missing = [name for name in fields if not isinstance(record, dict) or name not in record]
    if missing:
        raise UserError(f"{place} has no {missing[0]!r}; expected an object with {', '.join(fields)}")
    return record


def from_hub(path: str, name: str | None, split: str) -> list[dict]:
    """The records of a data set on the Hub. Raises UserError where it cannot be had."""
    import datasets

    try:
        return list(datasets.load_dataset(path, name, split=split))  # type: ignore[arg-type]
    except Exception as error:  # a network, a gate, a name: whatever `datasets` raises
        reason = why(error)
        raise UserError(f"{path} cannot be had from the Hub: {reason}; --data_dir takes local files instead") from None
