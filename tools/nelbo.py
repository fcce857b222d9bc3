"""The NELBO of a corpus by a masked diffusion model, or its exact NLL by an autoregressive one, over the same tokens.

    python -m tools.nelbo exports/diffugpt_s data/fineweb --rows 500 --draws 8 --output results/nelbo_diffugpt_s
    python -m tools.nelbo openai-community/gpt2 data/fineweb --rows 500 --output results/nelbo_gpt2
    python -m tools.compare results/nelbo_gpt2 results/nelbo_diffugpt_s

In: a checkpoint, and a corpus that `python -m data_prep prepare` made with the model's tokenizer. Out, in OUTPUT:
results.json, results.md and samples/, by source of the corpus and for all its rows together: nats and bits a token,
bits a byte by the source's mean bytes a token, perplexity, and the cross-entropy at masked tokens by bucket of t, each
with its standard error over rows. Noise is a function of the seed, the source, the row and the draw. The same command
continues where it was stopped.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from common.cli import make_parser, resumable_command
from common.errors import UserError
from common.log import log
from data_prep import shards, tokenizing, verify
from pretrain.model.reading import uses_shift

from .evaluation import nelbo_folder
from .evaluation.corpus_nelbo import EPS, LIKELIHOODS, Noise, Place
from .loading import fingerprint, kind_of, load_any


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for values that cannot work."""
    for name in ("rows", "draws", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, expected at least 1")
    if not 0 <= args.seed < 1 << 63:
        raise UserError(f"--seed is {args.seed}, expected 0 or more, below 2^63")
    if args.trust_remote_code and args.isolate_documents:
        raise UserError("--isolate_documents needs this project's own code; leave --trust_remote_code out")


def places_of(args: argparse.Namespace, manifest: shards.Manifest) -> tuple[dict[str, shards.ShardedRows], list[Place]]:
    """The sources, and up to --rows rows of each, evenly spread. Raises UserError where there are none."""
    problems = verify.check(args.corpus, hashes=False)
    if problems:
        raise UserError(f"{problems[0]}; run `python -m data_prep repair CONFIG`, with the configuration of the corpus")
    sources = {one.name: shards.ShardedRows(Path(args.corpus), getattr(one, args.split)) for one in manifest.sources}
    empty = [name for name, rows in sources.items() if not len(rows)]
    if len(empty) == len(sources):
        hint = f": prepare it with {shards.MORE_VALIDATION}" if args.split == "validation" else ""
        raise UserError(f"{args.corpus} has no {args.split} rows{hint}")
    if empty:
        log.warning("no %s rows in %s: left out", args.split, ", ".join(empty))
    if nelbo_folder.ALL in sources and len(sources) - len(empty) > 1:
        raise UserError(f"{args.corpus} has a source called {nelbo_folder.ALL!r}, the name of the sum; rename it")
    places = []
    for name, rows in sources.items():
        count = len(rows) if args.rows is None else min(args.rows, len(rows))
        places += [Place(name, i * len(rows) // count, i, count) for i in range(count)]
    return {name: rows for name, rows in sources.items() if len(rows)}, places


def check_fits(checkpoint: str, model: Any, tokenizer: Any, corpus: str, manifest: shards.Manifest) -> None:
    """Raises UserError where the corpus has another tokenizer, ids beyond the vocabulary or rows that are too long."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if manifest.tokenizer["vocab_size"] > vocabulary:
        raise UserError(
            f"{corpus} has ids up to {manifest.tokenizer['vocab_size'] - 1}, the vocabulary of {checkpoint} 0 to "
            f"{vocabulary - 1}; prepare the corpus with the model's tokenizer"
        )
    tokenizing.check_same(tokenizer, manifest.tokenizer, corpus, checkpoint)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and manifest.seq_len > limit:
        raise UserError(f"{corpus} has rows of {manifest.seq_len} tokens, but {checkpoint} takes {limit}")


def make_noise(args: argparse.Namespace, model: Any) -> Noise:
    """The noise of a diffusion model, with the smallest time that it was trained with."""
    about = getattr(model.config, "diffusion", None) or {}
    return Noise(args.likelihood, args.draws, args.seed, about.get("eps", EPS))


@resumable_command
def main(argv: list[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = make_parser("python -m tools.nelbo", __doc__)
    parser.add_argument("checkpoint", help="a folder written by tools.export, a base model, or a name on the Hub")
    parser.add_argument("corpus", help="a folder written by `python -m data_prep prepare`")
    parser.add_argument("--split", choices=("validation", "train"), default="validation", help="default: %(default)s")
    parser.add_argument("--rows", type=int, metavar="N", help="up to N rows a source, evenly spread; default: all")
    parser.add_argument("--draws", type=int, default=4, metavar="K", help="noise of each row; default: %(default)s")
    parser.add_argument(
        "--likelihood", choices=LIKELIHOODS, default=LIKELIHOODS[0],
        help="mask_count: draw how many tokens are masked; nelbo: draw t and mask each token with probability t, as in "
        "training, the same bound with more noise; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--batch_size", type=int, default=8, metavar="B", help="rows at a time; changes rounding alone; default: 8"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default: %(default)s")
    parser.add_argument("--isolate_documents", action="store_true", help="documents of a row do not see each other")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code in the checkpoint")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="is made; or holds this command's own work")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    check_arguments(args)
    manifest = shards.Manifest.load(args.corpus)
    settings = {
        "corpus": manifest.fingerprint,
        "split": args.split,
        "rows": args.rows,
        "isolate_documents": args.isolate_documents,
    }
    about: dict[str, Any] = {"model": args.checkpoint, "seed": args.seed, "settings": settings}
    folder = nelbo_folder.Folder(Path(args.output))
    folder.check_own(about)
    sources, places = places_of(args, manifest)
    kind = kind_of(args.checkpoint, args.trust_remote_code)
    model, tokenizer = load_any(args.checkpoint, kind, trust_remote_code=args.trust_remote_code)
    exact = kind == "autoregressive"
    check_fits(args.checkpoint, model, tokenizer, args.corpus, manifest)
    noise = None if exact else make_noise(args, model)
    about |= {
        "kind": "autoregressive" if exact else "masked_diffusion",
        "likelihood": {"name": "exact"} if noise is None else {"name": args.likelihood, "draws": args.draws},
        "weights": fingerprint(args.checkpoint),
    }
    with folder.opened(about):
        measured = nelbo_folder.measure(folder, model, sources, places, noise, args.batch_size, args.isolate_documents)
        first_counts = noise is not None and not uses_shift(model.config)
        nelbo_folder.report(folder, about, measured, manifest, first_counts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
