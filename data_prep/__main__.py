"""Documents to packed token shards.

    python -m data_prep prepare data_prep/configs/demo.yaml --dry_run      # files, tokens, time; writes nothing
    python -m data_prep prepare data_prep/configs/demo.yaml num_workers=8  # the same command continues
    python -m data_prep verify data/demo                                   # every checksum and every row
    python -m data_prep inspect data/demo                                  # counts, lengths, a decoded row

On a cluster (slurm/data_prep.sh does this): each of N tasks makes its share, then one merge.

    python -m data_prep prepare CONFIG --task 3 --num_tasks 16
    python -m data_prep merge CONFIG
"""

import argparse
import os
import sys
from pathlib import Path

from common.config import load_config
from common.errors import UserError

from . import shards, tokenizing
from .config import PrepareConfig

COLOURS = (36, 33, 32, 35)
SAMPLED_ROWS = 20_000  # rows that the length histogram looks at
BAR = 40  # characters


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    prepare = verbs.add_parser("prepare", help="tokenise and pack documents into shards; run again to continue")
    prepare.add_argument(
        "--dry_run", action="store_true", help="files, bytes, estimated tokens and time; writes nothing"
    )
    prepare.add_argument("--task", type=int, default=0, help="make only this share of the work, from 0")
    prepare.add_argument("--num_tasks", type=int, default=1, help="shares there are; `merge` is needed after them")
    merge = verbs.add_parser("merge", help="write the manifest when all tasks are done")
    deduplicate = verbs.add_parser("deduplicate", help="the first pass of deduplicate=exact, before the tasks")
    for verb in (prepare, merge, deduplicate):
        verb.add_argument("config", help="YAML with sources, tokenizer, seq_len, output_dir")
        verb.add_argument("overrides", nargs="*", metavar="key=value", help="such as num_workers=8")
    verify = verbs.add_parser("verify", help="check every shard against the manifest: size, sha256, every row")
    verify.add_argument("dir")
    inspect = verbs.add_parser("inspect", help="counts, document lengths, one decoded row with its boundaries")
    inspect.add_argument("dir")
    inspect.add_argument("--source", help="default: the first")
    inspect.add_argument("--split", choices=shards.SPLITS, default="train")
    inspect.add_argument("--row", type=int, default=0)
    args = parser.parse_args(argv)
    verb = {
        "prepare": _prepare,
        "merge": _merge,
        "deduplicate": _deduplicate,
        "verify": _verify,
        "inspect": _inspect,
    }[args.verb]
    try:
        return verb(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error}; what is finished is kept, the same command continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130


def _config(args: argparse.Namespace) -> PrepareConfig:
    return load_config(PrepareConfig, args.config, args.overrides)


def _prepare(args: argparse.Namespace) -> int:
    from .prepare import plan, prepare

    config = _config(args)
    if args.dry_run:
        print(plan(config))
        return 0
    manifest = prepare(config, task=args.task, num_tasks=args.num_tasks)
    if manifest is None:
        print(f"task {args.task} of {args.num_tasks} is done; when all are: python -m data_prep merge {args.config}")
    else:
        _summary(config.output_dir, manifest)
    return 0


def _merge(args: argparse.Namespace) -> int:
    from .prepare import merge

    config = _config(args)
    _summary(config.output_dir, merge(config))
    return 0


def _deduplicate(args: argparse.Namespace) -> int:
    from .prepare import deduplicate

    deduplicate(_config(args))
    return 0


def _summary(directory: str, manifest: shards.Manifest) -> None:
    about = manifest.tokenizer
    print(f"{directory}: rows of {manifest.seq_len} tokens ({manifest.dtype}, {manifest.packing})")
    print(f"  tokenizer {about['name']}, by {about['engine']}")
    for source in manifest.sources:
        train, held = (sum(shard.rows for shard in part) for part in (source.train, source.validation))
        places = (train + held) * manifest.seq_len
        print(
            f"  {source.name}: {source.documents:,} documents, {source.tokens:,} tokens → {train:,} training rows, "
            f"{held:,} validation rows, {100 * (1 - source.padding / max(1, places)):.2f}% full, "
            f"{source.remainder:,} tokens left over; mixture weight {source.weight:g}"
        )
        for title, reasons in (("cannot be used", source.bad), ("left out", source.filtered)):
            for reason, count in reasons.items():
                print(f"    {count:,} {title}: {reason}")
        for name in source.damaged:
            print(f"    damaged: {name}")


def _verify(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    manifest = shards.Manifest.load(args.dir)
    total = sum(shard.bytes for source in manifest.sources for shard in source.train + source.validation)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify") as bar:
        problems = shards.check(args.dir, contents=True, progress=lambda shard: bar.update(shard.bytes))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"{args.dir}: all shards match the manifest")
    return 1 if problems else 0


def _inspect(args: argparse.Namespace) -> int:
    manifest = shards.Manifest.load(args.dir)
    _summary(args.dir, manifest)
    names = [source.name for source in manifest.sources]
    name = args.source or names[0]
    if name not in names:
        raise UserError(f"no source {name!r} in {args.dir}; it has {', '.join(names)}")
    rows = shards.Rows(Path(args.dir), getattr(manifest.sources[names.index(name)], args.split))
    if not 0 <= args.row < len(rows):
        raise UserError(f"row {args.row} of {name}/{args.split}: expected 0 to {len(rows) - 1}")
    print(_histogram(rows))
    tokenizer = tokenizing.load_tokenizer(manifest.tokenizer["name"])
    ids, lengths = rows.row(args.row)
    print(f"{name}/{args.split} row {args.row}: {len(lengths)} documents of {', '.join(map(str, lengths))} tokens")
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    start = 0
    for i, length in enumerate(lengths):
        text = tokenizer.decode(ids[start : start + length].tolist())
        print(f"\033[{COLOURS[i % len(COLOURS)]}m{text}\033[0m" if colour else f"[{i}] {text}")
        start += length
    return 0


def _histogram(rows: shards.Rows) -> str:
    """Lengths of the documents' pieces in powers of two, over at most SAMPLED_ROWS rows."""
    import numpy as np

    step = max(1, len(rows) // SAMPLED_ROWS)
    lengths = np.concatenate([rows.row(i)[1] for i in range(0, len(rows), step)])
    counts = np.bincount(np.log2(lengths).astype(int))
    lines = [f"pieces of documents by length, in {len(range(0, len(rows), step)):,} of {len(rows):,} rows"]
    for power, count in enumerate(counts):
        bar = "█" * round(BAR * count / counts.max())
        lines.append(f"  {1 << power:>6} to {(2 << power) - 1:<6} {count:>9,} {bar}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
