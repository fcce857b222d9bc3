"""The published evaluation sets, which are not in the repository."""

import gzip
import json

import pytest
from helpers import SHARED

SETS = SHARED / "data" / "eval"


def records(name: str) -> list[dict]:
    """The records of a file of these sets; the test skips where it is missing."""
    path = SETS / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in the shared data")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
