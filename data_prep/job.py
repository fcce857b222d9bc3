"""What all verbs begin with: a checked configuration, its tokenizer, its units and the folder they are made in.

In: a PrepareConfig. Out: a `Job`; its folder is locked, and holds what other settings made nowhere.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from common.errors import UserError
from common.files import write_atomically
from common.log import log

from . import documents, shards, tokenizing, work_list
from .config import PrepareConfig, check_prepare
from .inputs.document import Tally
from .tokenizing import Engine, TokenizerSpec
from .work_list import Unit

# All that decides the bytes of a corpus, beside its tokenizer, its sources and its files
HASHED = ("seq_len", "packing", "add_bos", "add_eos", "validation_fraction", "deduplicate", "unit_mb", "shard_mb")
SAMPLE_DOCUMENTS = 200  # of the first unit, on which the fast engine is compared with the reference
SAMPLE_CHARACTERS = 20_000  # of each of them


@dataclass
class Job:
    """A checked configuration and what follows from it."""

    config: PrepareConfig
    tokenizer: TokenizerSpec
    units: list[Unit]  # of all sources
    corpus_hash: str

    @property
    def directory(self) -> Path:
        return Path(self.config.output_dir)


def load_job(config: PrepareConfig) -> Job:
    """Check the configuration, load its tokenizer and list its units."""
    check_prepare(config)
    tokenizer = tokenizing.load_tokenizer(config.tokenizer, config.tokenizer_revision)
    for wanted, name in ((config.add_bos, "bos_token"), (config.add_eos, "eos_token")):
        if wanted and getattr(tokenizer, f"{name}_id") is None:
            raise UserError(f"add_{name[:3]} is true, but tokenizer {config.tokenizer!r} has no {name}")
    spec = tokenizing.spec_of(tokenizer, config.tokenizer, config.tokenizer_revision)
    units = [unit for source in config.sources for unit in work_list.units(source, int(config.unit_mb * 2**20))]
    return Job(config, spec, units, _corpus_hash(config, spec, units))


def _corpus_hash(config: PrepareConfig, tokenizer: TokenizerSpec, units: list[Unit]) -> str:
    """Hash of everything that decides the corpus: settings, and the files' names, sizes and ends."""
    settings = {
        "version": shards.VERSION,
        "tokenizer": tokenizer.fingerprint,
        **{name: getattr(config, name) for name in HASHED},
        "sources": {s.name: [s.text_field, s.min_characters, s.filters] for s in config.sources},
    }
    content = json.dumps([settings, [work_list.unit_key(unit) for unit in units]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def load_finished(job: Job) -> shards.Manifest | None:
    """The manifest of a corpus that is already made, or None. New mixture weights are written into it."""
    if not (job.directory / "manifest.json").exists():
        return None
    manifest = shards.Manifest.load(job.directory)
    if manifest.corpus_hash != job.corpus_hash:
        raise UserError(
            f"{job.directory} holds a corpus made from other settings or files; "
            "choose another output_dir, or delete that folder first"
        )
    weights = {source.name: source.weight for source in job.config.sources}
    if weights != {source.name: source.weight for source in manifest.sources}:  # they do not change the shards
        for entry in manifest.sources:
            entry.weight = weights[entry.name]
        manifest.save(job.directory)
    warn_without_validation(job.config, manifest)
    return manifest


def check_unfinished(job: Job) -> None:
    """An unfinished corpus is continued only with the settings and files that began it."""
    path = job.directory / ".work" / "recipe"
    if path.exists() and path.read_text() != job.corpus_hash:
        raise UserError(
            f"{job.directory} holds an unfinished corpus made from other settings or files; "
            "choose another output_dir, or delete that folder first"
        )
    if not path.exists():
        write_atomically(path, job.corpus_hash.encode())


@contextmanager
def lock(directory: Path, task: int, num_tasks: int) -> Iterator[None]:
    """Keep two processes from writing the same units: tasks share the folder, but no task runs twice at a time."""
    work = directory / ".work"
    work.mkdir(parents=True, exist_ok=True)
    mode = fcntl.LOCK_SH if num_tasks > 1 else fcntl.LOCK_EX
    with open(work / "lock", "w") as whole, open(work / f"lock-{task}-of-{num_tasks}", "w") as part:
        try:
            fcntl.flock(whole, mode | fcntl.LOCK_NB)
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {directory}; wait for it, or stop it") from None
        yield


def select_engine(job: Job) -> tuple[Engine, str]:
    """(engine, the reason in one line), after a comparison on the first documents."""
    unit = job.units[0]
    source = next(source for source in job.config.sources if source.name == unit.source)
    found = islice(documents.read(unit, source, Tally()), SAMPLE_DOCUMENTS)
    texts = [text if isinstance(text, str) else next(text.blocks()) for text in found]
    return tokenizing.select_engine(job.tokenizer, job.config.engine, [text[:SAMPLE_CHARACTERS] for text in texts])


def warn_without_validation(config: PrepareConfig, manifest: shards.Manifest) -> None:
    for source in manifest.without_validation() if config.validation_fraction else []:
        log.warning(
            "source %s has %s documents (%s tokens) but gets no validation row: with validation_fraction=%g "
            "none of them is held out; use %s",
            source.name, f"{source.documents:,}", f"{source.tokens:,}", config.validation_fraction,
            shards.MORE_VALIDATION,
        )  # fmt: skip
