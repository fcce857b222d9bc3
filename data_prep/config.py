"""Settings as dataclasses, read from YAML and `key=value` overrides; unknown keys are errors.

In: a dataclass, a YAML file, a list of `a.b=value` strings. Out: an instance of the dataclass.
Precedence, lowest first: defaults in the dataclass, the YAML file, the command line.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


class UserError(Exception):
    """Something that the user can mend: the text names what was found, what was expected and what to do."""


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


def load_config(schema: type[T], path: str | Path | None, overrides: list[str] | None = None) -> T:
    """Read `path` over the defaults of `schema`, then apply `key=value` overrides (dots descend).

    Raises UserError for a missing file, YAML that does not parse, an unknown key, a value of the
    wrong type, or an override without `=`.
    """
    config = OmegaConf.structured(schema)
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"no configuration file at {path}")
        try:
            loaded = OmegaConf.create(Path(path).read_text(encoding="utf-8"))
            if not OmegaConf.is_dict(loaded):
                raise UserError(f"{path}: expected `key: value` lines at the top level")
            config = OmegaConf.merge(config, loaded)
        except OmegaConfBaseException as error:
            raise UserError(f"{path}: {_describe(error)}") from None
        except (yaml.YAMLError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not valid YAML: {str(error).replace(chr(10), ' ')}") from None
    for override in overrides or []:
        key, equals, _ = override.partition("=")
        if not equals:
            raise UserError(f"override {override!r}: expected key=value, such as train.steps=100")
        try:
            value = OmegaConf.from_dotlist([f"value={override[len(key) + 1 :]}"]).value
            OmegaConf.update(config, key, value, merge=True)
        except OmegaConfBaseException as error:
            raise UserError(f"override {override!r}: {_describe(error)}") from None
        except yaml.YAMLError as error:
            raise UserError(f"override {override!r}: {str(error).replace(chr(10), ' ')}") from None
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError(f"{path or 'configuration'}: no value for {', '.join(missing)}")
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(f"{path or 'configuration'}: {_describe(error)}") from None


def save_config(config: object, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def _describe(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None) or getattr(error, "key", None)
    schema = getattr(error, "object_type", None)
    first_line = str(error).splitlines()[0]
    if type(error).__name__ in ("ConfigKeyError", "ConfigAttributeError") and hasattr(schema, "__dataclass_fields__"):
        return f"unknown key {key!r}; known here: {', '.join(schema.__dataclass_fields__)}"
    return f"{key}: {first_line}"


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
