"""The folder that `tools.nelbo` writes. Finished rows are kept in samples/; the tables are made of them. Not a verb.

OUTPUT/nelbo.json                   what the command was asked; another command is refused
OUTPUT/samples/nelbo/SOURCE.jsonl   a line a row, in order, written as they are finished
OUTPUT/samples/nelbo/all.jsonl      at the end: the rows of all sources
OUTPUT/results.json, results.md     at the end
"""

import fcntl
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from common.errors import UserError
from common.files import write_atomically
from data_prep.shards import Manifest, ShardedRows
from pretrain.objectives.masked_diffusion import bucket_names
from pretrain.step import Rows, read_rows

from .corpus_nelbo import Noise, Place, RowScore, diffusion_scores, exact_scores, summary

ALL = "all"  # stands for the rows of all sources
LOCK = ".lock"  # held by the process that writes


@dataclass(frozen=True)
class Folder:
    """OUTPUT. The methods raise UserError where it is of another command."""

    path: Path

    @property
    def state(self) -> Path:
        return self.path / "nelbo.json"

    def samples(self, source: str) -> Path:
        return self.path / "samples" / "nelbo" / f"{source}.jsonl"

    def check_own(self, about: Mapping[str, Any]) -> None:
        """Check all that `about` names against what the folder's own command was asked."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"--output {self.path} is a file, expected a folder")
        if not self.state.exists():
            if any(not path.name.startswith((LOCK, self.state.name)) for path in self.path.iterdir()):
                raise UserError(f"--output {self.path} holds other things; choose an empty folder or a new one")
            return
        try:
            found = _flat(json.loads(self.state.read_text(encoding="utf-8")))
        except (ValueError, AttributeError):
            raise UserError(f"{self.state} is damaged; choose another --output") from None
        for name, expected in _flat(about).items():
            if found.get(name) != expected:
                raise UserError(
                    f"{self.path} was begun with {name} {found.get(name)!r}, this command has {expected!r}; give the "
                    "same command to continue it, or choose another --output"
                )

    @contextmanager
    def opened(self, about: Mapping[str, Any]) -> Iterator[None]:
        """Begin or continue the work of `about`, alone. Raises UserError where another process does so."""
        self.check_own(about)
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / LOCK, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another process writes {self.path}") from None
            self.check_own(about)  # another process may have begun meanwhile
            write_atomically(self.state, json.dumps(about, indent=1).encode() + b"\n")
            self.samples(ALL).parent.mkdir(parents=True, exist_ok=True)
            yield


def _flat(about: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name to value."""
    found: dict[str, Any] = {}
    for name, value in about.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def line_of(place: Place, ids: Any, score: RowScore) -> dict[str, Any]:
    """A line of samples/: what `tools.compare` reads, and the sums that the tables are made of."""
    digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]
    return {
        "doc_id": place.row,
        "doc": {"source": place.source, "row": place.row, "sha256": digest},
        "target": None,
        "answers": [],
        "metrics": {"nelbo": score.nll / score.tokens if score.tokens else 0.0},
        "weight": score.tokens,
        "sums": asdict(score),
    }


def finished_lines(path: Path, places: Sequence[Place], whole: int) -> list[dict[str, Any]]:
    """The lines that a stopped run has left, a multiple of `whole` or all, so that later batches are as they would be.

    Cuts the file after them: a last line may be torn. Raises UserError for a line of another row.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    if len(lines) < len(places):
        lines = lines[: len(lines) // whole * whole]
    found = []
    for number, (line, place) in enumerate(zip(lines, places), start=1):
        try:
            record = json.loads(line)
            RowScore(**record["sums"])
        except (ValueError, KeyError, TypeError):
            record = None
        if record is None or record.get("doc_id") != place.row or len(lines) > len(places):
            raise UserError(
                f"{path}:{number} is not of this command; delete {path.parent.parent.parent} and begin anew"
            )
        found.append(record)
    with open(path, "r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines))
    return found


def measure(
    folder: Folder,
    model: Any,
    sources: Mapping[str, ShardedRows],
    places: Sequence[Place],
    noise: Noise | None,
    batch_size: int,
    isolated: bool,
) -> dict[str, list[dict[str, Any]]]:
    """The lines of each source: those that are there, and the others measured and written. `noise` None: exactly.

    Raises UserError for ids beyond the vocabulary and for losses that are no number.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draws = 1 if noise is None else noise.draws
    step = max(1, batch_size // draws)  # rows
    measured: dict[str, list[dict[str, Any]]] = {}
    with tqdm(total=len(places), unit="row", disable=None) as bar:
        for source, stored in sources.items():
            own = [place for place in places if place.source == source]
            lines = finished_lines(folder.samples(source), own, step)
            bar.update(len(lines))
            with open(folder.samples(source), "ab", buffering=0) as file:
                for begin in range(len(lines), len(own), step):
                    part = own[begin : begin + step]
                    rows = read_rows([(stored, place.row) for place in part], [p.row for p in part], isolated)
                    _check_ids(rows, part, vocabulary)
                    if noise is None:
                        scores = exact_scores(model, rows, batch_size)
                    else:
                        scores = diffusion_scores(model, rows, part, noise, batch_size)
                    for place, score in zip(part, scores, strict=True):
                        if not math.isfinite(score.nll):
                            raise UserError(
                                f"the loss of row {place.row} of {source} is {score.nll}: the checkpoint's weights are "
                                "damaged, or its dtype overflows"
                            )
                    new = [line_of(place, ids, score) for place, ids, score in zip(part, rows.x0, scores)]
                    file.write("".join(json.dumps(line) + "\n" for line in new).encode())
                    lines += new
                    bar.update(len(new))
            measured[source] = lines
    return measured


def _check_ids(rows: Rows, places: Sequence[Place], vocabulary: int) -> None:
    for place, ids in zip(places, rows.x0):
        if ids.max() >= vocabulary:
            raise UserError(
                f"row {place.row} of {place.source} has id {ids.max()}, the model's vocabulary 0 to {vocabulary - 1}; "
                "run `python -m data_prep verify` on the corpus"
            )


def report(
    folder: Folder,
    about: Mapping[str, Any],
    measured: Mapping[str, list[dict[str, Any]]],
    manifest: Manifest,
    first_counts: bool,
) -> None:
    """Write results.json, results.md and samples of all sources together, and print the table.

    `first_counts`: whether first tokens were counted too. Raises UserError where no token was.
    """
    exact = about["kind"] == "autoregressive"
    bytes_per_token = {one.name: one.bytes / one.tokens for one in manifest.sources if one.bytes and one.tokens}
    scores = {source: [RowScore(**line["sums"]) for line in lines] for source, lines in measured.items()}
    text_bytes: dict[str, float | None] = {}
    for source, found in scores.items():
        tokens = sum(score.tokens for score in found)
        if not tokens:
            raise UserError(
                f"no token of the rows of {source} can be predicted: each is the first of its row or document"
            )
        text_bytes[source] = tokens * bytes_per_token[source] if source in bytes_per_token else None
    tasks = {f"nelbo/{source}": summary(found, text_bytes[source], exact) for source, found in scores.items()}
    if ALL not in scores:
        known = [size for size in text_bytes.values() if size is not None]
        together = sum(known) if len(known) == len(scores) else None
        tasks[f"nelbo/{ALL}"] = summary([score for found in scores.values() for score in found], together, exact)
        lines = [
            {**line, "doc_id": f"{source}/{line['doc_id']}"} for source, found in measured.items() for line in found
        ]  # fmt: skip
        write_atomically(folder.samples(ALL), "".join(json.dumps(line) + "\n" for line in lines).encode())
    versions = {name: version(name) for name in ("torch", "transformers")}
    results = {**about, "versions": versions, "tasks": tasks}
    write_atomically(folder.path / "results.json", json.dumps(results, indent=1).encode() + b"\n")
    header, rows = table_of(tasks, exact)
    sentence = counted(tasks[f"nelbo/{ALL}"]["tokens"], exact, first_counts)
    page = ["# " + ("Exact NLL" if exact else "NELBO"), "", f"Model: `{about['model']}`", ""]
    page += ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    page += ["| " + " | ".join(row) + " |" for row in rows] + ["", sentence, ""]
    write_atomically(folder.path / "results.md", "\n".join(page).encode())
    table = Table(title=str(about["model"]), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"{sentence}\nwrote {folder.path / 'results.json'}")


def counted(tokens: int, exact: bool, first_counts: bool) -> str:
    """Which tokens the table is about."""
    which = "all tokens" if first_counts else "every token but the first of a row, or of an isolated document"
    what = "The exact negative log-likelihood" if exact else "An upper bound of the negative log-likelihood"
    return f"{what} in nats a token, over {tokens:,} tokens: {which}. ± is the standard error over rows."


def table_of(tasks: Mapping[str, dict[str, Any]], exact: bool) -> tuple[list[str], list[list[str]]]:
    """(header, a row a source) of text."""
    names = ["nelbo", "perplexity_bound", "bits_per_token", "bits_per_byte"]
    shown = ["NLL" if exact else "NELBO", "perplexity" if exact else "perplexity ≤", "bits a token", "bits a byte"]
    if not exact:
        names += bucket_names("ce")
        shown += [f"CE, t ≤ {name.rpartition('_t')[2]}" for name in bucket_names("ce")]
    rows = []
    for task, found in tasks.items():
        cells = [_with_stderr(found, name, digits=2 if name == "perplexity_bound" else 4) for name in names]
        rows.append([task.removeprefix("nelbo/"), f"{found['n']:,}", f"{found['tokens']:,}", *cells])
    return ["source", "rows", "tokens", *shown], rows


def _with_stderr(found: dict[str, Any], name: str, digits: int) -> str:
    """A number and its standard error, where there are any."""
    value, stderr = found.get(name), found.get(f"{name}_stderr")
    if value is None:
        return "–"
    return f"{value:,.{digits}f}" + ("" if stderr is None else f" ± {stderr:,.{digits}f}")
