"""What decides which records of a source are kept, as its recipe states it."""

from typing import Any

from ..config import SourceConfig


def recipe(source: SourceConfig) -> list[Any]:
    """The filters as they are written, for the hash of the corpus. A hook is named here."""
    return [source.filters, source.filter]
