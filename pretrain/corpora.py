"""The corpora of a run as one: their sources by name, each with its weight and how often its rows may come.

    data.path: data/web                              one corpus
    data.path: [data/web, data/code]                 each source has the weight that its corpus's manifest says
    data.path: {data/web: 0.7, data/code: 0.3}       a corpus's sources divide its weight in proportion to theirs

data.weights and data.max_epochs name sources. Where two corpora have a source web, they are called CORPUSFOLDER/web.
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from math import floor, inf, isfinite
from pathlib import Path
from typing import Any

from common.errors import UserError
from data_prep.shards import Manifest, SourceEntry

# What may differ in the manifests' tokenizers: of the sizes the largest counts, the others do not change what ids mean.
MAY_DIFFER = ("vocab_size", "name", "revision", "engine")


@dataclass
class Source:
    """One source of a run."""

    folder: str  # of its corpus
    entry: SourceEntry
    weight: Fraction  # its corpus's manifest and data.path say so

    @property
    def rows(self) -> int:
        """Training rows."""
        return sum(shard.rows for shard in self.entry.train)


@dataclass
class Corpora:
    """All that a run knows of its corpora."""

    path: Any  # data.path
    manifests: dict[str, Manifest]  # by folder, in order
    sources: dict[str, Source]  # by name: the source's, or CORPUSFOLDER/SOURCE where several have that name

    @property
    def seq_len(self) -> int:
        return next(iter(self.manifests.values())).seq_len

    def check_length(self, expected: int | None) -> None:
        """Raise UserError where the rows have another length than `expected`, which is train.seq_len."""
        if expected not in (None, self.seq_len):
            raise UserError(f"{shown(self.path)} has rows of {self.seq_len} tokens, but train.seq_len is {expected}")

    @property
    def tokenizer(self) -> dict[str, Any]:
        """As a manifest says it."""
        found = [manifest.tokenizer for manifest in self.manifests.values()]
        return {**found[0], "vocab_size": max(tokenizer["vocab_size"] for tokenizer in found)}

    @property
    def fingerprint(self) -> str:
        """Hash of what a run draws its rows from. Of one corpus without max_epochs it is the manifest's."""
        content = [manifest.fingerprint for manifest in self.manifests.values()]
        limits = [source.entry.max_epochs for source in self.sources.values()]
        if len(content) == 1 and not any(limits):
            return content[0]
        total = sum(source.weight for source in self.sources.values())
        shares = [str(source.weight / total) for source in self.sources.values()]
        return hashlib.sha256(json.dumps([content, shares, limits]).encode()).hexdigest()

    def mixture(self, weights: dict[str, float] | None = None) -> dict[str, Fraction]:
        """Weight by name of the sources that take part, in the order of `weights` (data.weights) where these are given.

        Raises UserError for unknown sources, weights below 0, and where no source takes part.
        """
        self._check_names("data.weights", weights)
        chosen = weights or {name: source.weight for name, source in self.sources.items()}
        if not all(0 <= weight < inf for weight in chosen.values()) or not any(chosen.values()):
            raise UserError(f"data.weights is {chosen}, expected 0 or more for each source, and more for at least one")
        return {name: exact(weight) for name, weight in chosen.items() if weight > 0}

    def row_limit(self, name: str, max_epochs: dict[str, float] | None = None) -> int | None:
        """Rows that a source gives at most; None: no limit. `max_epochs` (data.max_epochs) goes before the manifest's.

        Raises UserError for unknown sources, a limit below 0, and one that leaves no row.
        """
        self._check_names("data.max_epochs", max_epochs)
        source = self.sources[name]
        epochs = (max_epochs or {}).get(name, source.entry.max_epochs)
        if not isfinite(epochs) or epochs < 0:
            raise UserError(f"max_epochs of source {name} is {epochs}, expected 0 or more; 0 is no limit")
        if epochs == 0:
            return None
        limit = floor(exact(epochs) * source.rows)
        if not limit:
            raise UserError(
                f"max_epochs of source {name} is {epochs}, of {source.rows} rows that is none; "
                "give it more, or leave it out by data.weights"
            )
        return limit

    def _check_names(self, setting: str, given: dict[str, float] | None) -> None:
        unknown = sorted(set(given or {}) - set(self.sources))
        if unknown:
            raise UserError(f"{setting} names {unknown}; {shown(self.path)} has {sorted(self.sources)}")


def exact(number: float | Fraction) -> Fraction:
    """The number as the decimal that it is written as."""
    return Fraction(str(number))


def folders(path: Any) -> list[str]:
    """The folders of data.path, in order. Raises UserError for a value that is none of the three forms."""
    listed = list(path) if isinstance(path, list | tuple | dict) else [path]
    names = [str(folder) for folder in listed if isinstance(folder, str | int | float | Path)]  # YAML: 2024 is a number
    if not names or not all(names) or len(names) < len(listed):
        raise UserError(
            f"data.path is {path!r}, expected a folder, a list of folders, or a mapping of folders to weights"
        )
    twice = [folder for folder, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"data.path names {twice[0]} twice")
    return names


def _shares(path: dict) -> dict[str, Fraction]:
    """The weights of the corpora in data.path."""
    for folder, weight in path.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 <= weight < inf:
            raise UserError(f"data.path gives {folder} the weight {weight!r}, expected a number of 0 or more")
    if not any(path.values()):
        raise UserError(f"data.path is {shown(path)}, expected a weight above 0 for at least one corpus")
    return {str(folder): exact(weight) for folder, weight in path.items()}


def shown(path: Any) -> str:
    """data.path in a sentence."""
    if isinstance(path, dict):
        return ", ".join(f"{folder} ({weight})" for folder, weight in path.items())
    return ", ".join(map(str, path)) if isinstance(path, list | tuple) else str(path)


def load_corpora(path: Any) -> Corpora:
    """The corpora of data.path.

    Raises UserError for a value that is no such thing, a folder without a manifest, corpora whose rows do not fit
    each other, and sources that cannot be told apart.
    """
    manifests = {folder: Manifest.load(folder) for folder in folders(path)}
    shares = _shares(path) if isinstance(path, dict) else None
    first = next(iter(manifests))
    sources = []
    for folder, manifest in manifests.items():
        _check_alike(first, manifests[first], folder, manifest)
        total = sum(exact(entry.weight) for entry in manifest.sources)
        factor = shares[folder] / total if shares else 1
        sources += [Source(folder, entry, exact(entry.weight) * factor) for entry in manifest.sources]
    return Corpora(path, manifests, _named(sources))


def _check_alike(first: str, one: Manifest, folder: str, other: Manifest) -> None:
    """Rows of both must mean the same to the model."""
    if one.seq_len != other.seq_len:
        raise UserError(
            f"{first} has rows of {one.seq_len} tokens, but {folder} of {other.seq_len}; a run needs one length: "
            f"`python -m data_prep rechunk` makes other rows of a corpus"
        )
    for key in [key for key in one.tokenizer if key in other.tokenizer and key not in MAY_DIFFER]:
        a, b = one.tokenizer[key], other.tokenizer[key]
        if a != b:
            if key == "fingerprint":
                a, b = (f"{of.tokenizer['name']} {value[:12]}…" for of, value in ((one, a), (other, b)))
            raise UserError(
                f"{first} and {folder} were tokenised in different ways, {key}: {a} and {b}; "
                "prepare one of them again, as the other"
            )


def _named(sources: list[Source]) -> dict[str, Source]:
    """The sources by names that are unique."""
    count = Counter(source.entry.name for source in sources)
    named: dict[str, Source] = {}
    for source in sources:
        name = source.entry.name
        if count[name] > 1:
            name = f"{os.path.basename(os.path.abspath(source.folder))}/{name}"
        if name in named:
            raise UserError(
                f"{named[name].folder} and {source.folder} both have a source {source.entry.name}, and the same last "
                "part of the path, so it has no name of its own; rename or move one of the folders"
            )
        named[name] = source
    return named
