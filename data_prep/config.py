"""What a corpus is made from and how: the configuration of `python -m data_prep prepare`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from common.config import check_bounds, setting
from common.errors import UserError


@dataclass
class SourceConfig:
    name: str = MISSING  # also the name of the folder that holds its shards
    # Files, globs, folders or @LIST (a file of paths), local or s3://, hf://datasets/NAME and so on.
    # Kinds: .jsonl .json .ndjson .txt, each also with .gz or .zst; .parquet .arrow
    paths: list[str] = MISSING
    text_field: str = "text"  # the column that holds the document
    weight: float = setting(1.0, above=0)  # share in the training mixture, relative to the other sources
    min_characters: int = 1  # shorter documents are filtered out
    filters: dict[str, list[Any]] = field(default_factory=dict)  # column (dots descend): the values to keep


@dataclass
class PrepareConfig:
    sources: list[SourceConfig] = MISSING
    tokenizer: str = MISSING  # folder or Hub name, as for AutoTokenizer.from_pretrained
    tokenizer_revision: str = "main"
    seq_len: int = setting(MISSING, at_least=2)  # tokens a row
    output_dir: str = MISSING
    packing: Literal["concat", "best_fit"] = "concat"  # cut documents at row ends, or keep whole those that fit a row
    engine: Literal["auto", "tokenizers", "gigatoken"] = "auto"  # auto: the fastest that gives the exact ids
    deduplicate: Literal["none", "exact"] = "none"  # exact: of equal documents keep the first
    max_bad_fraction: float = setting(0.01, at_least=0, at_most=1)  # fail if a larger share of documents is unusable
    add_bos: bool = False  # begin each document with the tokenizer's bos_token
    add_eos: bool = True  # end each document with the tokenizer's eos_token
    # Share of the documents that is held out, chosen by a hash of their text
    validation_fraction: float = setting(0.01, at_least=0, below=1)
    num_workers: int = setting(0, at_least=0)  # processes; 0: one per CPU core. Does not change the bytes written
    unit_mb: float = setting(64, above=0)  # MB of files per unit of work; every unit begins new shard files
    shard_mb: int = setting(256, at_least=1)  # a shard file is closed when its tokens take this many MB


def check_prepare(config: PrepareConfig) -> None:
    """Raise UserError for values that cannot work, before anything is read or written."""
    if not config.sources:
        raise UserError("sources is empty: give at least one source with name and paths")
    names = [source.name for source in config.sources]
    if len(set(names)) != len(names):
        raise UserError(f"two sources have the same name: {names}")
    for source in config.sources:
        _check_source(source)
    check_bounds(config)


def _check_source(source: SourceConfig) -> None:
    """The name becomes a folder, so it must not leave the corpus folder or be hidden."""
    valid = source.name and all(c.isalnum() or c in "-_." for c in source.name) and source.name[0] != "."
    if not valid:
        raise UserError(f"source name {source.name!r}: use letters, digits, '-', '_' and '.', not '.' first")
    try:
        check_bounds(source)
    except UserError as error:
        raise UserError(f"source {source.name}: {error}") from None
