"""What a corpus is made from and how: the configuration of `python -m data_prep prepare`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from common.errors import UserError


@dataclass
class SourceConfig:
    name: str = MISSING  # also the folder of its shards
    # Files, globs, folders or @LIST (a file of paths), local or s3://, hf://datasets/NAME and so on:
    # .jsonl .json .ndjson .txt, each also .gz .zst; .parquet .arrow
    paths: list[str] = MISSING
    text_field: str = "text"  # the column that holds the document
    weight: float = 1.0  # share of this source in the training mixture, relative to the others
    min_characters: int = 1  # shorter documents are left out
    filters: dict[str, list[Any]] = field(default_factory=dict)  # column (dots descend): the values wanted


@dataclass
class PrepareConfig:
    sources: list[SourceConfig] = MISSING
    tokenizer: str = MISSING  # folder or Hub name, as for AutoTokenizer.from_pretrained
    tokenizer_revision: str = "main"
    seq_len: int = MISSING  # tokens a row
    output_dir: str = MISSING
    packing: Literal["concat", "best_fit"] = "concat"  # documents run on across rows, or stay whole where they fit
    engine: Literal["auto", "tokenizers", "gigatoken"] = "auto"  # auto: the fastest that proves exact
    deduplicate: Literal["none", "exact"] = "none"  # of equal documents keep the first
    max_bad_fraction: float = 0.01  # more documents that cannot be used are an error
    add_bos: bool = False  # begin each document with the tokenizer's bos_token
    add_eos: bool = True  # end each document with the tokenizer's eos_token
    validation_fraction: float = 0.01  # share of documents held out, chosen by a hash of their text
    num_workers: int = 0  # processes; 0: one a CPU core. The bytes written do not depend on it
    unit_mb: float = 64  # MB of files that one unit of work reads; shards end where units do
    shard_mb: int = 256  # a shard file is closed when its tokens fill this many MB


def check_prepare(config: PrepareConfig) -> None:
    """Raise UserError for values that cannot work, before anything is read or written."""

    def need(condition: bool, text: str) -> None:
        if not condition:
            raise UserError(text)

    need(bool(config.sources), "sources is empty: give at least one source with name and paths")
    names = [source.name for source in config.sources]
    need(len(set(names)) == len(names), f"two sources have the same name: {names}")
    for source in config.sources:
        safe = source.name and all(c.isalnum() or c in "-_." for c in source.name) and source.name[0] != "."
        need(bool(safe), f"source name {source.name!r}: use letters, digits, '-', '_' and '.', not '.' first")
        need(source.weight > 0, f"source {source.name}: weight is {source.weight}, expected a number above 0")
    need(config.seq_len >= 2, f"seq_len is {config.seq_len}, expected at least 2")
    need(
        0 <= config.validation_fraction < 1,
        f"validation_fraction is {config.validation_fraction}, expected 0 <= fraction < 1",
    )
    need(
        0 <= config.max_bad_fraction <= 1,
        f"max_bad_fraction is {config.max_bad_fraction}, expected a share from 0 to 1",
    )
    need(config.num_workers >= 0, f"num_workers is {config.num_workers}, expected 0 (all cores) or more")
    need(config.unit_mb > 0 and config.shard_mb >= 1, "unit_mb must be above 0, shard_mb at least 1")
