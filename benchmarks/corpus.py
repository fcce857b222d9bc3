"""Times data_prep and its alternatives on the same text; writes benchmarks/corpus.md.

    python benchmarks/corpus.py TEXT.jsonl --tokenizer TOKENIZER [--peers .venv-bench/bin/python]

Every pass runs in a process of its own and times its work after its imports; passes take turns, and the
table has medians. datatrove, mosaicml-streaming and litdata need other versions of common packages than
this project, so `--peers` names the Python of an environment that has them:

    python -m venv .venv-bench
    .venv-bench/bin/pip install torch==2.13.0
    .venv-bench/bin/pip install --no-deps -r benchmarks/peers.txt
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SEQ_LEN = 2048
READS = 20_000  # random rows that are read
Args = argparse.Namespace


def texts(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def json_alone(args: Args) -> float:
    import orjson

    began = time.perf_counter()
    with open(args.text, "rb") as file:
        for line in file:
            orjson.loads(line)
    return time.perf_counter() - began


def encode_batch(args: Args) -> float:
    """Ids only: nothing is read, packed or written."""
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(args.tokenizer).backend_tokenizer
    documents = texts(args.text)
    began = time.perf_counter()
    for start in range(0, len(documents), 256):
        backend.encode_batch_fast(documents[start : start + 256], add_special_tokens=False)
    return time.perf_counter() - began


def datasets_map(args: Args) -> float:
    """Tokenize, then group into blocks, as transformers' run_clm.py does."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)

    def tokenize(batch):
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in tokenizer(batch["text"])["input_ids"]]}

    def group(batch):
        ids = [i for row in batch["input_ids"] for i in row]
        whole = len(ids) // SEQ_LEN * SEQ_LEN
        return {"input_ids": [ids[start : start + SEQ_LEN] for start in range(0, whole, SEQ_LEN)]}

    began = time.perf_counter()
    data = datasets.load_dataset("json", data_files=args.text, split="train", cache_dir=f"{args.out}/cache")
    data = data.map(tokenize, batched=True, num_proc=args.workers, remove_columns=data.column_names)
    data = data.map(group, batched=True, num_proc=args.workers)
    data.save_to_disk(f"{args.out}/saved")
    return time.perf_counter() - began


def datatrove(args: Args) -> float:
    """Reader and tokenizer only, without its merge and shuffle."""
    from datatrove.executor import LocalPipelineExecutor  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.readers import JsonlReader  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.tokens import DocumentTokenizer  # pyright: ignore[reportMissingImports]

    parts = Path(args.out, "parts")  # it gives each task whole files
    parts.mkdir(parents=True)
    lines = Path(args.text).read_bytes().splitlines(keepends=True)
    for n in range(4 * args.workers):
        (parts / f"{n}.jsonl").write_bytes(b"".join(lines[n :: 4 * args.workers]))
    tokenizer = f"{args.tokenizer}/tokenizer.json" if Path(args.tokenizer).is_dir() else args.tokenizer
    steps = [JsonlReader(str(parts)), DocumentTokenizer(f"{args.out}/tokens", tokenizer_name_or_path=tokenizer)]
    executor = LocalPipelineExecutor(
        steps, tasks=4 * args.workers, workers=args.workers, logging_dir=f"{args.out}/logs", skip_completed=False
    )
    began = time.perf_counter()
    executor.run()
    return time.perf_counter() - began


def ours(args: Args) -> float:
    """Documents to finished, hashed shards and manifest, which are then verified."""
    import transformers.models.auto.tokenization_auto  # noqa: F401, takes two seconds, whatever the text

    from data_prep.config import PrepareConfig, SourceConfig
    from data_prep.prepare import prepare
    from data_prep.verify import check

    began = time.perf_counter()
    source = SourceConfig("text", [args.text])
    config = PrepareConfig([source], args.tokenizer, seq_len=SEQ_LEN, output_dir=f"{args.out}/corpus")
    config.num_workers = args.workers
    config.unit_mb = 8
    config.engine = args.engine
    config.packing = args.packing
    prepare(config, progress=False)
    problems = check(config.output_dir, contents=True)
    if problems:
        raise RuntimeError(problems[0])
    return time.perf_counter() - began


def scaling(args: Args) -> float:
    """Seconds for 4 copies of the text less those for one copy, so that the time to start up drops out."""
    copies = [f"{args.out}/copies-{n}.jsonl" for n in (1, 4)]
    for path, n in zip(copies, (1, 4)):
        Path(path).write_bytes(Path(args.text).read_bytes() * n)
    if args.workers == 1:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one process, one core
    seconds = [
        ours(argparse.Namespace(**{**vars(args), "text": path, "out": f"{args.out}/{n}"}))
        for n, path in enumerate(copies)
    ]
    return seconds[1] - seconds[0]


def peak(args: Args) -> float:
    """Peak memory in MB of preparing 20 or 200 MB of the text with 1 process."""
    text = Path(args.text).read_bytes()
    size = 10**6 * (20 if args.run == "peak_20" else 200)
    path = Path(args.out, "text.jsonl")
    path.write_bytes((text * (1 + size // len(text)))[:size].rpartition(b"\n")[0])
    del text
    ours(argparse.Namespace(**{**vars(args), "text": str(path)}))
    status = Path("/proc/self/status").read_text().splitlines()  # getrusage would include the parent's memory
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def read_ours(args: Args) -> float:
    from data_prep import shards

    manifest = shards.Manifest.load(args.corpus)
    rows = shards.ShardedRows(Path(args.corpus), manifest.sources[0].train)
    return _read(lambda i: rows.row(i)[0].sum(), len(rows))


def read_streaming(args: Args) -> float:
    from streaming import MDSWriter, StreamingDataset  # pyright: ignore[reportMissingImports]

    with MDSWriter(out=f"{args.out}/mds", columns={"input_ids": f"ndarray:uint16:{SEQ_LEN}"}) as writer:
        for ids in _rows(args.corpus):
            writer.write({"input_ids": ids})
    data = StreamingDataset(local=f"{args.out}/mds", shuffle=False, batch_size=1)
    return _read(lambda i: data[i]["input_ids"].sum(), len(data))


def read_litdata(args: Args) -> float:
    import litdata  # pyright: ignore[reportMissingImports]
    import torch
    from litdata.streaming.item_loader import TokensLoader  # pyright: ignore[reportMissingImports]
    from litdata.streaming.writer import BinaryWriter  # pyright: ignore[reportMissingImports]

    writer = BinaryWriter(f"{args.out}/lit", chunk_bytes="64MB", item_loader=TokensLoader(SEQ_LEN))
    os.makedirs(f"{args.out}/lit", exist_ok=True)
    for i, ids in enumerate(_rows(args.corpus)):
        writer[i] = torch.from_numpy(ids.copy())
    writer.done()
    writer.merge()
    data = litdata.StreamingDataset(f"{args.out}/lit", item_loader=TokensLoader(SEQ_LEN), shuffle=False)
    return _read(lambda i: data[i].numpy().sum(), len(data))


def _rows(corpus: str) -> "Iterator[np.ndarray]":
    """Our training rows, read with pyarrow alone, as the peers' environment has no data_prep."""
    import pyarrow as pa

    for path in sorted(Path(corpus, "text").glob("train-*.arrow")):
        with pa.memory_map(str(path)) as file:
            for batch in pa.ipc.open_stream(file):
                yield from batch.column("input_ids").flatten().to_numpy().reshape(-1, SEQ_LEN)


def _read(row: Callable[[int], object], count: int) -> float:
    """Seconds for READS random rows, each of which `row` sums up, after all rows were read once."""
    import random

    for i in range(count):
        row(i)
    order = random.Random(0)
    picks = [order.randrange(count) for _ in range(READS)]
    began = time.perf_counter()
    for i in picks:
        row(i)
    return time.perf_counter() - began


PASSES = {
    # name: (function, workers, whether the peers' Python runs it, title)
    "json": (json_alone, 1, False, "reading the JSON alone, 1 process"),
    "encode_batch": (encode_batch, 2, False, "`tokenizers` encode_batch_fast, 2 threads, ids only"),
    "datasets": (datasets_map, 2, False, "`datasets.map` + grouping, 2 processes"),
    "datatrove": (datatrove, 2, True, "`datatrove` tokenizer step, 2 processes"),
    "ours_tokenizers": (ours, 2, False, "data_prep, engine=tokenizers, 2 processes"),
    "ours_1": (ours, 1, False, "**data_prep, 1 process**"),
    "ours_best_fit": (ours, 2, False, "data_prep, packing=best_fit, 2 processes"),
    "ours_2": (ours, 2, False, "**data_prep, 2 processes**"),
}
SCALING = {"scaling_1": (scaling, 1, False, "1 process on 1 core"), "scaling_2": (scaling, 2, False, "2 processes")}
MEMORY = {f"peak_{mb}": (peak, 1, False, f"{mb} MB of text") for mb in (20, 200)}
READING = {
    "read_ours": (read_ours, 1, False, "**data_prep's shards**"),
    "read_streaming": (read_streaming, 1, True, "`mosaicml-streaming`"),
    "read_litdata": (read_litdata, 1, True, "`litdata` (TokensLoader)"),
}


def time_pass(name: str, by_peers: bool, workers: int, args: Args, corpus: str = "") -> float | None:
    """What one pass printed last: its seconds or megabytes. None, and its error on stderr, if it failed."""
    with tempfile.TemporaryDirectory() as out:
        command = [args.peers if by_peers else sys.executable, __file__, args.text, "--tokenizer", args.tokenizer]
        command += ["--run", name, "--workers", str(workers), "--out", out, "--corpus", corpus]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true" if workers == 1 else ""}
        if name in ("datasets", "datatrove"):
            environment["TOKENIZERS_PARALLELISM"] = "false"  # their processes use the cores
        elif "ours" in name or not environment["TOKENIZERS_PARALLELISM"]:
            environment.pop("TOKENIZERS_PARALLELISM")
        outcome = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
        if outcome.returncode:
            print(f"{name} failed:\n{outcome.stderr[-1500:]}", file=sys.stderr)
            return None
        return float(outcome.stdout.splitlines()[-1])


def measure(passes: dict, args: Args, corpus: str = "") -> dict[str, Any]:
    """Median of each pass over the repeats, in which the passes take turns."""
    found: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(args.repeats):
        for name, (_, workers, by_peers, _) in passes.items():
            if by_peers and not args.peers:
                continue
            seconds = time_pass(name, by_peers, workers, args, corpus)
            if seconds is not None:
                found[name].append(seconds)
                print(f"{name:<16} {seconds:8.2f}", file=sys.stderr)
    return {name: statistics.median(times) if times else None for name, times in found.items()}


def table(args: Args) -> str:
    """Run all passes; returns benchmarks/corpus.md without its first line."""
    size = sum(len(text.encode()) for text in texts(args.text)) / 1e6
    corpus = tempfile.mkdtemp()
    prepared = argparse.Namespace(**{**vars(args), "out": corpus, "workers": 2, "engine": "auto", "packing": "concat"})
    ours(prepared)
    from data_prep import shards

    manifest = shards.Manifest.load(f"{corpus}/corpus")
    tokens = sum(source.tokens for source in manifest.sources)
    seconds = measure(PASSES, args)
    reading = measure(READING, args, f"{corpus}/corpus")
    scaled = measure(SCALING, args)
    memory = measure(MEMORY, args)
    shutil.rmtree(corpus)
    peers = [seconds[name] for name in ("datasets", "datatrove") if seconds[name]]
    lines = [
        f"{size:.0f} MB of text, {tokens / 1e6:.1f}M tokens of {Path(args.tokenizer).name}, rows of {SEQ_LEN}; "
        f"{os.cpu_count()} cores, Python {platform.python_version()}; medians of {args.repeats} runs that take turns. "
        "The times of `data_prep` include all but its imports: checking the engine, starting workers, hashing, "
        "verification.",
        "",
        "| documents to … | s | MB/s | M tokens/s | faster than datasets.map, datatrove |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, (*_, title) in PASSES.items():
        if seconds[name]:
            s = seconds[name]
            ratio = ", ".join(f"{peer / s:.1f}" for peer in peers)
            lines.append(f"| {title} | {s:.2f} | {size / s:.1f} | {tokens / 1e6 / s:.2f} | {ratio} |")
    lines += ["", "| every further MB of text | MB/s |", "| --- | --- |"]
    lines += [f"| {title} | {3 * size / scaled[name]:.0f} |" for name, (*_, title) in SCALING.items()]
    lines += [f"| ratio | {scaled['scaling_1'] / scaled['scaling_2']:.2f} |"]
    lines += ["", "| peak memory of the process | MB |", "| --- | --- |"]
    lines += [f"| {title} | {memory[name]:.0f} |" for name, (*_, title) in MEMORY.items()]
    lines += ["", f"| {READS:,} random rows, files in memory | rows/s |", "| --- | --- |"]
    lines += [f"| {t} | {READS / reading[n]:,.0f} |" for n, (*_, t) in READING.items() if reading[n]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="JSONL with a field `text`")
    parser.add_argument("--tokenizer", default="gpt2", help="folder or Hub name")
    parser.add_argument("--peers", help="Python of an environment with datatrove, mosaicml-streaming and litdata")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", choices=[*PASSES, *SCALING, *MEMORY, *READING], help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--corpus", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        args.engine = "tokenizers" if args.run == "ours_tokenizers" else "auto"
        args.packing = "best_fit" if args.run == "ours_best_fit" else "concat"
        print(({**PASSES, **SCALING, **MEMORY, **READING})[args.run][0](args))
        return
    found = table(args)
    print(found)
    Path(__file__).with_suffix(".md").write_text(f"`python benchmarks/corpus.py` wrote this.\n\n{found}")


if __name__ == "__main__":
    main()
