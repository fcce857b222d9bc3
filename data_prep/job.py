"""What all verbs begin with: a checked configuration, its tokenizer, its units and the folder they are made in.

In: a PrepareConfig. Out: a `Job`, whose folder holds nothing that other settings made.
"""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.log import log

from . import documents, engines, shards, tokenizing, verify, work_list
from .config import PrepareConfig, SourceConfig, check_prepare
from .engines import Engine
from .inputs import filters
from .inputs.document import Tally, text_of
from .inputs.listing import list_files
from .locks import flock
from .retrying import with_retries
from .tokenizing import TokenizerSpec
from .work_list import SourceList, Unit, WorkList

# All that decides the bytes of a corpus, beside its tokenizer, its sources and its files
HASHED = (
    "seq_len", "packing", "add_bos", "add_eos", "separator", "special_tokens_in_text", "max_document_mb",
    "validation_fraction", "deduplicate", "unit_mb", "shard_mb",
)  # fmt: skip
HASHED_OF_SOURCE = ("text_field", "tokens_field", "boundaries", "min_characters", "max_tokens")  # and its filters
RESTORE = "restore it from a copy: the corpus can be read without it, but neither repaired nor added to"
APPEND = "; to add to the corpus, use `python -m data_prep append CONFIG`"
SAMPLE_DOCUMENTS = 200  # of the first unit, on which the fast engine is compared with the reference
SAMPLE_CHARACTERS = 20_000  # of each of them


@dataclass
class Job:
    """A checked configuration and what follows from it."""

    config: PrepareConfig
    tokenizer: TokenizerSpec
    work: WorkList  # of a finished corpus: that of all its parts; empty for one of version 1, which kept none

    @property
    def directory(self) -> Path:
        return Path(self.config.output_dir)

    @cached_property
    def units(self) -> list[Unit]:
        """Of all sources."""
        return self.work.units

    @cached_property
    def corpus_hash(self) -> str:
        return self.work.corpus_hash()


def load_job(config: PrepareConfig, save: bool = True) -> Job:
    """Check the configuration, load its tokenizer, and make its work list or load the saved one.

    With `save` false nothing is written, and the files are listed whatever there is. Raises UserError also for an
    unfinished corpus that was begun with other settings.
    """
    check_prepare(config)
    tokenizer = tokenizing.load_tokenizer(config.tokenizer, config.tokenizer_revision)
    if config.add_bos and tokenizer.bos_token_id is None:
        raise UserError(f"add_bos is true, but tokenizer {config.tokenizer!r} has no bos_token")
    spec = tokenizing.spec_of(
        tokenizer, config.tokenizer, config.tokenizer_revision, config.special_tokens_in_text,
        _separator(config, tokenizer),
    )  # fmt: skip
    directory = Path(config.output_dir)
    if not save:
        work = make_work_list(config, spec)
    elif (directory / "manifest.json").exists():
        parts = [work_list.load(directory / part.inputs, RESTORE) for part in shards.Manifest.load(directory).parts]
        work = work_list.join(parts) if parts else WorkList(_settings(config, spec), [])
    else:
        work = _saved_work_list(config, spec)
    return Job(config, spec, work)


def _separator(config: PrepareConfig, tokenizer: Any) -> int | None:
    """The id that ends a document. Raises UserError for a separator that is no token."""
    if not config.add_eos:
        if config.separator:
            raise UserError(f"separator is {config.separator!r}, but with add_eos=false nothing ends a document")
        return None
    if config.separator:
        found = tokenizer.get_vocab().get(config.separator)
        if found is None:
            special = ", ".join(map(str, tokenizer.all_special_tokens)) or "none"
            raise UserError(
                f"separator is {config.separator!r}, which is no token of {config.tokenizer!r}; its special tokens "
                f"are: {special}"
            )
        return found
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"add_eos is true, but tokenizer {config.tokenizer!r} has no eos_token; give a separator, or add_eos=false"
        )
    return tokenizer.eos_token_id


def work_list_path(directory: Path) -> Path:
    """Of a corpus that is not finished."""
    return directory / ".work" / "work_list.json"


def make_work_list(config: PrepareConfig, tokenizer: TokenizerSpec, before: WorkList | None = None) -> WorkList:
    """List the files of every source and cut them into units; beside `before`, only the files that are not in it.

    The units of a source in `before` are numbered from the end of those, and a source without new files is left out.
    """
    began = time.monotonic()
    known = {source.name: source for source in before.sources} if before else {}
    sources = []
    for source in config.sources:
        listing = list_files(source)
        documents.check_files(source, [file.path for file in chain(*listing.groups)])
        first = 0
        if source.name in known:
            listing = work_list.without(listing, known[source.name].files())
            first = known[source.name].units[-1].index + 1
        units = work_list.units(source, int(config.unit_mb * 2**20), listing, first)
        if units:
            sources.append(
                SourceList(source.name, list(source.paths), _source_settings(source), listing.ignored, units)
            )
        if listing.ignored:
            log.info("source %s: left out, as no documents: %s", source.name, work_list.ignored_text(listing.ignored))
    found = WorkList(_settings(config, tokenizer), sources)
    files = sum(len(source.files()) for source in sources)
    log.info("listed %s files, %s units in %.1f s", f"{files:,}", f"{len(found.units):,}", time.monotonic() - began)
    return found


def _settings(config: PrepareConfig, tokenizer: TokenizerSpec) -> dict[str, Any]:
    """All settings that decide the bytes of the corpus, but those of its sources."""
    return {
        "version": shards.VERSION,
        "tokenizer": tokenizer.fingerprint,
        **{name: _number(getattr(config, name)) for name in HASHED},
    }


def _number(value: Any) -> Any:
    """0 for 0.0, which a YAML file gives where a call gives 0: they have one hash."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _source_settings(source: SourceConfig) -> dict[str, Any]:
    found = {name: getattr(source, name) for name in HASHED_OF_SOURCE} | {"filters": filters.recipe(source)}
    return json.loads(json.dumps(found))  # as it is when it was saved: tuples are lists


def settings_difference(
    config: PrepareConfig, tokenizer: TokenizerSpec, work: WorkList, adding: bool = False
) -> str | None:
    """The first setting in which a configuration differs from that of a work list; `adding` allows more sources."""
    pairs = [("", work.settings, _settings(config, tokenizer))]
    then = {source.name: source for source in work.sources}
    for source in config.sources:
        if source.name in then:
            pairs.append((f"{source.name}: ", then.pop(source.name).settings, _source_settings(source)))
        elif not adding:
            return f"source {source.name} is new"
    if then:
        return f"source {next(iter(then))} is not there any more"
    for owner, old, new in pairs:
        for name in [*old, *new]:
            if old.get(name) != new.get(name):
                return f"{owner}{name} was {old.get(name)!r} and is {new.get(name)!r}"
    return None


def _saved_work_list(config: PrepareConfig, tokenizer: TokenizerSpec) -> WorkList:
    """The work list of an unfinished corpus; the first task makes it, and others that start meanwhile wait."""
    directory = Path(config.output_dir)
    path = work_list_path(directory)
    if (path.parent / "recipe").exists():
        raise UserError(
            f"{directory} holds an unfinished corpus made by an earlier version; choose another output_dir, or delete "
            "that folder first"
        )
    if not path.exists():
        with _work_list_lock(path):
            if not path.exists():
                work = make_work_list(config, tokenizer)
                work.save(path)
                return work
    work = work_list.load(path)
    difference = settings_difference(config, tokenizer, work)
    if not difference and [source.paths for source in work.sources] != [list(s.paths) for s in config.sources]:
        moved = make_work_list(config, tokenizer)  # the same files may have come to another folder
        if moved.corpus_hash() != work.corpus_hash():
            difference = "paths name other files"
        else:
            moved.save(path)
            work = moved
    if difference:
        raise UserError(
            f"{directory} holds an unfinished corpus made from other settings or files ({difference}); "
            "choose another output_dir, or delete that folder first"
        )
    return work


@contextmanager
def _work_list_lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as file:
        try:
            flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another task lists the files; waiting for its list")
            flock(file, fcntl.LOCK_EX)
        yield


def load_finished(job: Job) -> shards.Manifest | None:
    """The manifest of a corpus that is already made, or None. New mixture weights are written into it.

    Raises UserError for a corpus that was made from other settings or files, naming the first, and for one whose shards
    are missing or cut off.
    """
    if not (job.directory / "manifest.json").exists():
        return None
    manifest = shards.Manifest.load(job.directory)
    difference = change(job) if manifest.parts else _difference_of_early(job, manifest)
    if difference:
        raise UserError(
            f"{job.directory} holds a corpus made from other settings or files ({difference}); "
            "choose another output_dir, or delete that folder first"
        )
    verify.check_sizes(job.directory, manifest.sources)
    new = {source.name: (source.weight, source.max_epochs) for source in job.config.sources}
    if new != {entry.name: (entry.weight, entry.max_epochs) for entry in manifest.sources}:  # shards stay as they are
        for entry in manifest.sources:
            entry.weight, entry.max_epochs = new[entry.name]
        manifest.save(job.directory)
    warn_without_validation(job.config, manifest)
    return manifest


def change(job: Job, adding: bool = False) -> str | None:
    """What differs from the settings and files that a finished corpus was made from; the files are listed again.

    With `adding`, more sources and more files are no difference.
    """
    difference = settings_difference(job.config, job.tokenizer, job.work, adding)
    if difference:
        return difference + (APPEND if difference.endswith("is new") else "")
    then = {source.name: source.files() for source in job.work.sources}
    for source in job.config.sources:
        if source.name not in then:
            continue
        found = work_list.first_change(then[source.name], list(chain(*list_files(source).groups)))
        if found and not (adding and found[0] == "was added"):
            what, file = found
            return f"{file.path} {what}{APPEND if what == 'was added' else ''}"
    return None


def _difference_of_early(job: Job, manifest: shards.Manifest) -> str | None:
    """The same of a corpus of an earlier version, as far as its manifest tells: it kept no list of its files."""
    about = manifest.tokenizer
    then = {
        "tokenizer": about["fingerprint"],
        "seq_len": manifest.seq_len,
        "packing": manifest.packing,
        "add_bos": about["add_bos"],
        "add_eos": about["add_eos"],
        "sources": [source.name for source in manifest.sources],
    }
    now = {
        "tokenizer": job.tokenizer.fingerprint,
        **{name: getattr(job.config, name) for name in ("seq_len", "packing", "add_bos", "add_eos")},
        "sources": [source.name for source in job.config.sources],
    }
    for name, value in then.items():
        if value != now[name]:
            return f"{name} was {value!r} and is {now[name]!r}"
    log.warning(
        "%s was made by an earlier version; its manifest agrees with the configuration, but it does not tell "
        "whether files were added or changed since", job.directory,
    )  # fmt: skip
    return None


def select_engine(job: Job) -> tuple[Engine, str]:
    """(engine, the reason in one line), after a comparison on the first documents."""
    unit = next((unit for unit in job.units if not documents.has_ids(unit, job.config)), None)
    if unit is None:
        return tokenizing.Reference(job.tokenizer), "not needed: all sources have token ids"

    def sample() -> list[str]:
        found = islice(documents.of_unit(unit, job.config, job.tokenizer, Tally()), SAMPLE_DOCUMENTS)
        return [text_of(document)[:SAMPLE_CHARACTERS] for document in found]

    texts = with_retries(sample, job.config.read_retries, "reading the first documents")
    return engines.select_engine(job.tokenizer, job.config.engine, texts)


def warn_without_validation(config: PrepareConfig, manifest: shards.Manifest) -> None:
    for source in manifest.without_validation() if config.validation_fraction else []:
        log.warning(
            "source %s has %s documents (%s tokens) but gets no validation row: with validation_fraction=%g "
            "none of them is held out; use %s",
            source.name, f"{source.documents:,}", f"{source.tokens:,}", config.validation_fraction,
            shards.MORE_VALIDATION,
        )  # fmt: skip
