"""What a corpus is made from and how: the configuration of `python -m data_prep prepare`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from common.config import check_bounds, setting
from common.errors import UserError

from .inputs import filters


@dataclass
class SourceConfig:
    name: str = MISSING  # also the name of the folder that holds its shards
    # Files, globs, folders or @LIST (a file of paths), local or s3://, hf://datasets/NAME and so on.
    # Kinds: .jsonl .json .ndjson .txt, each also with .gz or .zst; .parquet .arrow
    paths: list[str] = MISSING
    text_field: str = "text"  # the column that holds the document; dots descend: data.text
    tokens_field: str = ""  # the column that holds token ids, for rows that are tokenized already; "": texts are read
    boundaries: Literal["record", "eos"] = "record"  # where a tokenized document ends: with its record, or at an EOS
    weight: float = setting(1.0, above=0)  # share in the training mixture, relative to the other sources
    min_characters: int = 1  # shorter documents are filtered out
    # column (dots descend): a value, a list of values, or a comparison such as ">= 3"; others are filtered out
    filters: dict[str, Any] = field(default_factory=dict)
    filter: str = ""  # module:function that is given each record and says whether to keep it
    max_tokens: int = setting(0, at_least=0)  # documents beyond so many tokens are not read; 0: no limit
    max_epochs: float = setting(0.0, at_least=0)  # training repeats no row more often; 0: no limit


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
    max_bad_fraction: float = setting(0.01, at_least=0, at_most=1)  # fail if more of a source's documents is unusable
    max_damaged_files: int = setting(0, at_least=0)  # fail if more files of a source are damaged or cut off
    max_document_mb: int = setting(256, at_least=1)  # longer documents are unusable, unless they are a text file each
    read_retries: int = setting(5, at_least=0)  # of a unit whose files cannot be read, after 1, 2, 4, ... seconds
    special_tokens_in_text: Literal["text", "special", "error"] = "text"  # what "</s>" in a document is
    add_bos: bool = False  # begin each document with the tokenizer's bos_token
    add_eos: bool = True  # end each document with the separator
    separator: str = ""  # the token that ends a document; "": the tokenizer's eos_token
    # Share of the documents that is held out, chosen by a hash of their text
    validation_fraction: float = setting(0.01, at_least=0, below=1)
    num_workers: int = setting(0, at_least=0)  # processes; 0: one per CPU that this process may use
    # MB of files per unit of work; every unit begins new shard files. 0: 1/256 of the source, within 16 and 1024
    unit_mb: float = setting(0.0, at_least=0)
    shard_mb: int = setting(1024, at_least=1)  # a shard file is closed when its tokens take this many MB


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
    """The name becomes a folder, so it must not leave the corpus folder or be hidden; its filters mean something."""
    valid = source.name and all(c.isalnum() or c in "-_." for c in source.name) and source.name[0] != "."
    if not valid:
        raise UserError(f"source name {source.name!r}: use letters, digits, '-', '_' and '.', not '.' first")
    try:
        check_bounds(source)
        filters.check(source)
    except UserError as error:
        raise UserError(f"source {source.name}: {error}") from None
