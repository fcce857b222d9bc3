"""Prepare, verify and inspect packed token shards.

python -m data_prep prepare data_prep/configs/demo.yaml seq_len=512
python -m data_prep verify data/demo
python -m data_prep inspect data/demo
"""

import argparse
import os
import sys

from . import shards, tokenizing
from .config import PrepareConfig, UserError, load_config

COLOURS = (36, 33, 32, 35)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    prepare = verbs.add_parser("prepare", help="tokenise and pack documents into shards; run again to continue")
    prepare.add_argument("config", help="YAML with sources, tokenizer, seq_len, output_dir")
    prepare.add_argument("overrides", nargs="*", metavar="key=value", help="such as num_workers=8")
    verify = verbs.add_parser("verify", help="check every shard against the manifest: size, sha256, every row")
    verify.add_argument("dir")
    inspect = verbs.add_parser("inspect", help="counts, and one decoded row with its document boundaries")
    inspect.add_argument("dir")
    inspect.add_argument("--source", help="default: the first")
    inspect.add_argument("--split", choices=shards.SPLITS, default="train")
    inspect.add_argument("--row", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        return {"prepare": _prepare, "verify": _verify, "inspect": _inspect}[args.verb](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130


def _prepare(args: argparse.Namespace) -> int:
    from .prepare import prepare

    config = load_config(PrepareConfig, args.config, args.overrides)
    manifest = prepare(config)
    _summary(config.output_dir, manifest)
    return 0


def _summary(directory: str, manifest: shards.Manifest) -> None:
    print(f"{directory}: rows of {manifest.seq_len} tokens ({manifest.dtype}), tokenizer {manifest.tokenizer['name']}")
    for source in manifest.sources:
        train, held = (sum(shard.rows for shard in part) for part in (source.train, source.validation))
        print(
            f"  {source.name}: {source.documents:,} documents, {source.tokens:,} tokens → {train:,} training rows, "
            f"{held:,} validation rows, {source.remainder:,} tokens left over; mixture weight {source.weight:g}"
        )
        for reason, count in source.skipped.items():
            print(f"    skipped {count:,} documents: {reason}")


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
    rows = shards.Rows(shards.Path(args.dir), getattr(manifest.sources[names.index(name)], args.split))
    if not 0 <= args.row < len(rows):
        raise UserError(f"row {args.row} of {name}/{args.split}: expected 0 to {len(rows) - 1}")
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


if __name__ == "__main__":
    sys.exit(main())
