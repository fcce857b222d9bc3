"""How data_prep grows: with the text, with the number of files, with the number of shards; writes corpus_scale.md.

    python benchmarks/corpus_scale.py TEXT.jsonl --tokenizer TOKENIZER [--peers .venv-bench/bin/python]

1. Documents to shards beside datatrove and `datasets.map` with two processes, on `--megabytes` of the text,
   which is repeated as often as needed.
2. The time from the start of a task to the first document of its first unit, with `--files` files in a folder
   and behind a local HTTP server that serves ranges: of the first task, which makes the work list, and of a later one.
3. Random rows a second, the same rows in 200, 2,000 and 20,000 shards: each row for the first time, and again.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import corpus
from data_prep import documents, shards
from data_prep.config import PrepareConfig, SourceConfig
from data_prep.inputs.document import Tally
from data_prep.job import load_job
from data_prep.packing import PackedRows
from data_prep.writing import ShardWriter

ROWS, SEQ_LEN = 200_000, 512  # of the corpora that random rows are read from
READS = 20_000
PASSES = ("datasets", "datatrove", "ours_2")


def grow(text: str, megabytes: int, path: Path) -> None:
    """Write the texts of `text`, and no other column, again and again, until there are `megabytes` MB of lines."""
    lines = (json.dumps({"text": found}, ensure_ascii=False) for found in corpus.texts(text))
    content = "".join(f"{line}\n" for line in lines).encode()
    size = megabytes * 10**6
    with open(path, "wb") as file:
        while size > len(content):
            file.write(content)
            size -= len(content)
        file.write(content[:size].rpartition(b"\n")[0] + b"\n")


def growing_text(args: argparse.Namespace) -> list[str]:
    lines = [
        "| MB of JSONL | `datasets.map` s | `datatrove` s | **data_prep** s | faster than datasets.map, datatrove |",
        "| --- | --- | --- | --- | --- |",
    ]
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder, "text.jsonl")
            grow(args.text, megabytes, text)
            # the slow ones take minutes on a large text, so there they run once
            repeats = args.repeats if megabytes <= 200 else 1
            found: dict[str, list[float]] = {name: [] for name in PASSES}
            for turn in range(max(repeats, args.repeats)):
                for name in PASSES:
                    if (turn >= repeats and name != "ours_2") or (name == "datatrove" and not args.peers):
                        continue
                    _, workers, by_peers, _ = corpus.PASSES[name]
                    pass_args = argparse.Namespace(**{**vars(args), "text": str(text)})
                    seconds = corpus.time_pass(name, by_peers, workers, pass_args)
                    if seconds is not None:
                        found[name].append(seconds)
                        print(f"{megabytes} MB {name:<12} {seconds:8.2f}", file=sys.stderr)
        medians = {name: statistics.median(times) if times else float("nan") for name, times in found.items()}
        ours = medians["ours_2"]
        cells = " | ".join(f"{medians[name]:.1f} ({len(found[name])})" if found[name] else "failed" for name in PASSES)
        ratios = ", ".join(f"{medians[name] / ours:.1f}" if found[name] else "–" for name in PASSES[:2])
        lines.append(f"| {megabytes:,} | {cells} | {ratios} |")
    return lines


class RangeHandler(SimpleHTTPRequestHandler):
    """Serves a folder and answers requests for a range of bytes, as object stores do."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        content = path.read_bytes()
        wanted = self.headers.get("Range")
        first, last = 0, len(content) - 1
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}"')
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[first : last + 1])

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of the folder's files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=str(folder)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def first_document(config: PrepareConfig, task: int) -> float:
    """Seconds from the configuration to the first document of the task's first unit; the list is kept."""
    began = time.perf_counter()
    job = load_job(config)
    unit = job.units[task]
    next(documents.of_unit(unit, config, job.tokenizer, Tally()))
    return time.perf_counter() - began


def first_bytes(args: argparse.Namespace) -> list[str]:
    lines = [
        f"| {args.files:,} files | first task, which lists them: s | a later task: s |",
        "| --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "files")
        folder.mkdir()
        record = Path(args.text).read_bytes().split(b"\n", 1)[0] + b"\n"
        for i in range(args.files):
            (folder / f"{i:06d}.jsonl").write_bytes(record)
        with served(folder) as address:
            names = Path(temporary, "names.txt")
            names.write_text("".join(f"{address}/{i:06d}.jsonl\n" for i in range(args.files)))
            for title, path in (("in a local folder", str(folder)), ("behind a local HTTP server", f"@{names}")):
                first, later = [], []
                for repeat in range(args.repeats):
                    out = Path(temporary, f"{title}-{repeat}")
                    # units of about 20 files, so that the later task has one of its own
                    config = PrepareConfig([SourceConfig("s", [path])], args.tokenizer, seq_len=64, output_dir=str(out))
                    config.unit_mb = 20 * len(record) / 2**20
                    first.append(first_document(config, 0))
                    later.append(first_document(config, 1))
                print(f"{title}: {first} {later}", file=sys.stderr)
                lines.append(f"| {title} | {statistics.median(first):.2f} | {statistics.median(later):.2f} |")
    return lines


def write_shards(folder: Path, count: int) -> list[shards.Shard]:
    """ROWS rows in `count` shards."""
    schema = shards.schema(SEQ_LEN, "uint16", "none")
    rng = np.random.default_rng(0)
    rows = ROWS // count
    found = []
    for i in range(count):
        writer = ShardWriter(folder, f"s/train-{i:05d}-000.arrow", schema)
        ids = rng.integers(0, 50_000, (rows, SEQ_LEN), dtype=np.uint16)
        one = np.ones(rows, dtype=np.int64)
        writer.append(PackedRows(ids, one * SEQ_LEN, one, np.zeros(rows, dtype=bool)))
        found.append(writer.close())
    return found


def random_rows(args: argparse.Namespace) -> list[str]:
    """The numbers of shards take turns, so that a slow minute of the machine hits all of them."""
    counts = args.shards
    rng = np.random.default_rng(1)
    picks = [int(i) for i in rng.integers(0, ROWS, READS)]
    speeds: dict[tuple[int, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        written = {count: write_shards(Path(temporary, str(count)), count) for count in counts}
        for _ in range(max(5, args.repeats)):
            for count in counts:
                rows = shards.ShardedRows(Path(temporary, str(count)), written[count])
                for title in ("first", "again"):
                    if title == "again":
                        for i in range(ROWS):
                            rows.row(i)
                    began = time.perf_counter()
                    for i in picks:
                        rows.row(i)[0].sum()
                    speeds.setdefault((count, title), []).append(READS / (time.perf_counter() - began))
    lines = ["| shards | rows/s, each shard first opened | rows/s after that |", "| --- | --- | --- |"]
    for count in counts:
        first, again = (statistics.median(speeds[count, title]) for title in ("first", "again"))
        lines.append(f"| {count:,} | {first:,.0f} | {again:,.0f} |")
    again = [statistics.median(speeds[count, "again"]) for count in counts]
    lines.append(f"| largest / smallest | | {max(again) / min(again):.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="JSONL with a field `text`")
    parser.add_argument("--tokenizer", default="gpt2", help="folder or Hub name")
    parser.add_argument("--peers", help="Python of an environment with datatrove: see benchmarks/corpus.py")
    parser.add_argument("--megabytes", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--shards", type=int, nargs="+", default=[200, 2_000, 20_000])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    about = (
        f"{Path(args.tokenizer).name}'s tokenizer; {os.cpu_count()} cores, Python {platform.python_version()}; medians "
        "of runs that take turns, their number in brackets."
    )
    parts = [["`python benchmarks/corpus_scale.py` wrote this.", "", about]]
    measures = {
        f"{READS:,} random rows of {ROWS:,}, files in memory": random_rows,
        "From the start of a task to its first document": first_bytes,
        "Documents to shards, 2 processes": growing_text,
    }
    for title, measure in measures.items():
        parts.append([f"## {title}", "", *measure(args)])
        found = "\n\n".join("\n".join(part) for part in parts) + "\n"
        Path(__file__).with_suffix(".md").write_text(found)
    print(found)


if __name__ == "__main__":
    main()
