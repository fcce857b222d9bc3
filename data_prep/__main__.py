"""Documents to packed token shards.

    python -m data_prep prepare data_prep/configs/demo.yaml --dry_run      # files, tokens, time; writes nothing
    python -m data_prep prepare data_prep/configs/demo.yaml num_workers=8  # run again to continue
    python -m data_prep verify data/demo                                   # every checksum and every row
    python -m data_prep repair data_prep/configs/demo.yaml                 # bad shards are made again, the same bytes
    python -m data_prep append data_prep/configs/demo.yaml                 # adds new sources and files of CONFIG
    python -m data_prep rechunk data/demo --seq_len 4096 --output_dir data/demo_4096  # rows of another length
    python -m data_prep inspect data/demo                                  # counts, lengths, a decoded row

On a cluster (slurm/data_prep.sh does this): each of N tasks makes its share, then one merge writes the manifest.
For `deduplicate: exact`, tasks hash the documents before, and then one process finds the duplicates.

    python -m data_prep deduplicate CONFIG --task 3 --num_tasks 16
    python -m data_prep deduplicate CONFIG
    python -m data_prep prepare CONFIG --task 3 --num_tasks 16
    python -m data_prep merge CONFIG
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from common.cli import make_parser, resumable_command
from common.config import load_config
from common.errors import UserError
from common.log import log

from . import shards, tokenizing, verify
from .config import PrepareConfig

COLOURS = (36, 33, 32, 35)  # of the terminal: cyan, yellow, green, magenta
SAMPLED_ROWS = 20_000  # rows that the length histogram looks at
BAR = 40  # characters


@resumable_command
def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("python -m data_prep", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    prepare = verbs.add_parser("prepare", help="tokenize and pack documents into shards; run again to continue")
    prepare.add_argument(
        "--dry_run", action="store_true", help="files, bytes, estimated tokens and time; writes nothing"
    )
    prepare.add_argument("--task", type=int, default=0, help="the number of the share of the work to make, from 0")
    prepare.add_argument("--num_tasks", type=int, default=1, help="number of shares; `merge` is needed after them")
    merge = verbs.add_parser("merge", help="write the manifest when all tasks are done")
    deduplicate = verbs.add_parser("deduplicate", help="find the duplicates, before the tasks, if the config asks so")
    deduplicate.add_argument("--task", type=int, default=0, help="the number of the share of the work to hash, from 0")
    deduplicate.add_argument(
        "--num_tasks", type=int, default=1, help="number of shares; once more without it chooses, after them"
    )
    append = verbs.add_parser("append", help="add the sources and files that a finished corpus does not have yet")
    append.add_argument("--task", type=int, default=0, help="the number of the share of the work to make, from 0")
    append.add_argument("--num_tasks", type=int, default=1, help="number of shares; `merge` is needed after them")
    repair = verbs.add_parser("repair", help="verify, and make the bad shards again from the same inputs")
    repair.add_argument("--dry_run", action="store_true", help="only say what is bad and would be made again")
    of_config = [
        (prepare, _prepare), (merge, _merge), (deduplicate, _deduplicate), (append, _append), (repair, _repair),
    ]  # fmt: skip
    for verb, run in of_config:
        verb.add_argument("config", help="YAML with sources, tokenizer, seq_len, output_dir")
        verb.add_argument("overrides", nargs="*", metavar="key=value", help="such as num_workers=8")
        verb.set_defaults(run=run)
    verify = verbs.add_parser("verify", help="check every shard against the manifest: size, sha256, every row")
    verify.add_argument("dir")
    verify.add_argument("--num_workers", type=int, default=0, metavar="N", help="processes; default: one per CPU")
    verify.add_argument("--task", type=int, default=0, help="the number of the share of the shards, from 0")
    verify.add_argument("--num_tasks", type=int, default=1, help="number of shares")
    verify.set_defaults(run=_verify)
    rechunk = verbs.add_parser("rechunk", help="rows of another length from the shards of a concat corpus")
    rechunk.add_argument("dir")
    rechunk.add_argument("--seq_len", type=int, required=True, metavar="N", help="tokens of the new rows")
    rechunk.add_argument("--output_dir", required=True, help="is made; the same command continues there")
    rechunk.add_argument("--num_workers", type=int, default=0, metavar="N", help="processes; default: one per CPU")
    rechunk.add_argument("--shard_mb", type=int, default=1024, help="size of a shard file; default: %(default)s")
    rechunk.set_defaults(run=_rechunk)
    inspect = verbs.add_parser("inspect", help="counts, document lengths, one decoded row with its boundaries")
    inspect.add_argument("dir")
    inspect.add_argument("--source", help="default: the first")
    inspect.add_argument("--split", choices=shards.SPLITS, default="train")
    inspect.add_argument("--row", type=int, default=0)
    inspect.set_defaults(run=_inspect)
    return parser


def _config(args: argparse.Namespace) -> PrepareConfig:
    return load_config(PrepareConfig, args.config, args.overrides, interpolate=False)  # paths may hold ${


def _prepare(args: argparse.Namespace) -> int:
    from .estimate import estimate
    from .prepare import prepare

    config = _config(args)
    if args.dry_run:
        print(estimate(config))
        return 0
    manifest = prepare(config, task=args.task, num_tasks=args.num_tasks)
    if manifest is None:
        log.info(
            "task %d of %d is done; when all are: python -m data_prep merge %s", args.task, args.num_tasks, args.config
        )
    else:
        _print_summary(config.output_dir, manifest)
    return 0


def _append(args: argparse.Namespace) -> int:
    from .append import append

    config = _config(args)
    manifest = append(config, task=args.task, num_tasks=args.num_tasks)
    if manifest is None:
        log.info(
            "task %d of %d is done; when all are: python -m data_prep merge %s", args.task, args.num_tasks, args.config
        )
    else:
        _print_summary(config.output_dir, manifest)
    return 0


def _merge(args: argparse.Namespace) -> int:
    from . import append
    from .prepare import merge

    config = _config(args)
    if append.is_unfinished(Path(config.output_dir)):
        _print_summary(config.output_dir, append.merge(config))
        return 0
    _print_summary(config.output_dir, merge(config))
    return 0


def _deduplicate(args: argparse.Namespace) -> int:
    from .append import hash_share
    from .deduplication import deduplicate

    config = _config(args)
    if (Path(config.output_dir) / "manifest.json").exists():  # for what is to be added
        hash_share(config, True, args.task, args.num_tasks)
    else:
        deduplicate(config, task=args.task, num_tasks=args.num_tasks)
    if config.deduplicate != "none" and args.num_tasks > 1:
        log.info(
            "task %d of %d is hashed; when all are: python -m data_prep deduplicate %s",
            args.task, args.num_tasks, args.config,
        )  # fmt: skip
    return 0


def _repair(args: argparse.Namespace) -> int:
    from .repair import repair

    config = _config(args)
    found = repair(config, args.dry_run)
    if not found.problems:
        print(f"{config.output_dir}: every shard is as it was made; nothing to repair")
        return 0
    units = ", ".join(f"{unit.source} {unit.index}" for unit in found.units)
    if args.dry_run:
        print(f"{config.output_dir}: {len(found.problems)} problems; to be made again: units {units}")
        return 1
    if found.is_finished:
        print(f"{config.output_dir}: repaired, by making again units {units}; all shards match the manifest")
    else:
        print(
            f"{config.output_dir}: not made any more: units {units}; now run prepare again "
            "(on a cluster the tasks, then merge)"
        )
    return 0


def _print_summary(directory: str, manifest: shards.Manifest) -> None:
    tokenizer = manifest.tokenizer
    print(f"{directory}: rows of {manifest.seq_len} tokens ({manifest.dtype}, {manifest.packing})")
    print(f"  tokenizer {tokenizer['name']}, by {tokenizer['engine']}")
    for source in manifest.sources:
        train = sum(shard.rows for shard in source.train)
        validation = sum(shard.rows for shard in source.validation)
        places = (train + validation) * manifest.seq_len
        print(
            f"  {source.name}: {source.documents:,} documents, {source.tokens:,} tokens → {train:,} training rows, "
            f"{validation:,} validation rows, {100 * (1 - source.padding / max(1, places)):.2f}% full, "
            f"{source.dropped_tokens:,} tokens dropped at the ends of units; mixture weight {source.weight:g}"
        )
        for title, reasons in (("unusable", source.bad), ("filtered out", source.filtered)):
            for reason, count in reasons.items():
                print(f"    {count:,} {title}: {reason}")
        for name in source.damaged:
            print(f"    damaged: {name}")
        for suffix, count in source.ignored.items():
            print(f"    {count:,} files left out, as no documents: {suffix}")
        if source.not_read_bytes:
            print(f"    {source.not_read_bytes / 1e6:,.1f} MB of files not used, beyond max_tokens")


def _verify(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .pool import worker_count

    tasks = verify.tasks_of(shards.Manifest.load(args.dir), args.task, args.num_tasks)
    total = sum(task.shard.bytes for task in tasks)
    workers = worker_count(args.num_workers, len(tasks))
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify") as bar:
        problems = verify.check(
            args.dir, contents=True, progress=lambda shard: bar.update(shard.bytes),
            num_workers=workers, task=args.task, num_tasks=args.num_tasks,
        )  # fmt: skip
    for problem in problems:
        log.error("%s", problem)
    if not problems:
        which = "all shards" if args.num_tasks == 1 else f"the {len(tasks)} shards of task {args.task}"
        print(f"{args.dir}: {which} match the manifest")
    return 1 if problems else 0


def _rechunk(args: argparse.Namespace) -> int:
    from .rechunk import rechunk

    manifest = rechunk(args.dir, args.seq_len, args.output_dir, args.num_workers, args.shard_mb)
    _print_summary(args.output_dir, manifest)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    manifest = shards.Manifest.load(args.dir)
    _print_summary(args.dir, manifest)
    for source in manifest.without_validation():
        print(f"  {source.name} has no validation rows; to get some: {shards.MORE_VALIDATION}")
    names = [source.name for source in manifest.sources]
    name = args.source or names[0]
    if name not in names:
        raise UserError(f"no source {name!r} in {args.dir}; it has {', '.join(names)}")
    rows = shards.ShardedRows(Path(args.dir), getattr(manifest.sources[names.index(name)], args.split))
    if not len(rows):
        raise UserError(f"{name} has no {args.split} rows in {args.dir}")
    if not 0 <= args.row < len(rows):
        raise UserError(f"row {args.row} of {name}/{args.split}: expected 0 to {len(rows) - 1}")
    print(_histogram(rows))
    tokenizer = tokenizing.load_tokenizer(manifest.tokenizer["name"], manifest.tokenizer.get("revision", "main"))
    ids, lengths = rows.row(args.row)
    print(f"{name}/{args.split} row {args.row}: {len(lengths)} documents of {', '.join(map(str, lengths))} tokens")
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    start = 0
    for i, length in enumerate(lengths):
        text = tokenizer.decode(ids[start : start + length].tolist())
        print(f"\033[{COLOURS[i % len(COLOURS)]}m{text}\033[0m" if in_colour else f"[{i}] {text}")
        start += length
    return 0


def _histogram(rows: shards.ShardedRows) -> str:
    """Lengths of the pieces of documents in powers of two, over at most SAMPLED_ROWS rows."""
    step = max(1, len(rows) // SAMPLED_ROWS)
    sampled = range(0, len(rows), step)
    lengths = np.concatenate([rows.row(i)[1] for i in sampled])
    counts = np.bincount(np.log2(lengths).astype(int))
    lines = [f"pieces of documents by length, in {len(sampled):,} of {len(rows):,} rows"]
    for power, count in enumerate(counts):
        bar = "█" * round(BAR * count / counts.max())
        lines.append(f"  {1 << power:>6} to {(2 << power) - 1:<6} {count:>9,} {bar}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
