"""Text from an exported diffusion model: continue a prompt, or fill gaps.

    python -m tools.generate exports/demo --prompt "Once upon a time" --length 64 --seed 1
    python -m tools.generate exports/demo --infill "There was a [MASK:6] who lived in a castle." --order entropy
    python -m tools.generate exports/demo --prompts prompts.txt --length 64 --batch_size 16 --output samples.jsonl
    python -m tools.generate exports/demo --prompt "Once upon a time" --watch
    python -m tools.generate exports/demo --prompt "Once" --compare random entropy threshold=0.9,cache=window

[MASK:n] stands for n unknown tokens; a text may have several. A line of a prompts file is a text to continue, a text
with gaps, or a JSON object with `prompt` or `text`. A sample depends on --seed, its text and its number alone: the
same in any batch, and in a file of any length. With --resume a stopped --output is continued.
A rule that is given replaces the rules of the checkpoint's defaults.
"""

import argparse
import errno
import fcntl
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from common.cli import command, make_parser
from common.errors import UserError
from pretrain.model.rules import ORDERS
from pretrain.model.settings import NAMES, SamplingSettings

from .decoding import GAP, Completion, Request, complete_all, load, request, settings_of
from .watch import watch

FLAGS: dict[str, tuple[type, str]] = {
    "steps": (int, "the most model calls a text takes, but one a block; 0: one a token, the default"),
    "temperature": (float, "0 takes the most probable token; default: 1"),
    "top_k": (int, "draw from the k most probable tokens"),
    "top_p": (float, "draw from the most probable tokens that hold this share of probability"),
    "min_p": (float, "draw from tokens with this share of the best one's probability, or more"),
    "repetition_penalty": (float, "above 1, tokens that are there already become less likely"),
    "order": (str, "which masks are filled first; with a rule below, by default what that rule ranks by"),
    "block_length": (int, "fill so many masks at a time, from left to right; 0: all at once"),
    "threshold": (float, "a step also takes all tokens of a higher probability (Fast-dLLM); 0.9 is usual"),
    "factor": (float, "a step takes n tokens if (n + 1)(1 - the n-th probability) is less (Fast-dLLM)"),
    "entropy_bound": (float, "a step takes tokens while their entropies sum up to less, in nats"),
    "kl_threshold": (float, "with --threshold: only where the prediction has moved less for two steps (KLASS)"),
    "verify_threshold": (float, "with --threshold: take tokens back that are less likely in context (WINO); 0.9"),
    "remasking": (float, "take a token of probability p back with this probability times 1 - p (ReMDM)"),
    "cache": (str, "window: compute the block alone between full passes; faster, an approximation; or none"),
    "refresh_every": (int, "with --cache: a full pass every so many steps of a block; default: at its first"),
}
CHOICES = {"order": ORDERS, "cache": ("window", "none")}


def add_rules(parser: argparse.ArgumentParser) -> None:
    """The flags of SamplingSettings."""
    group = parser.add_argument_group(
        "how to decode", "what is not given is as the checkpoint's generation_config.json says"
    )
    for name, (kind, text) in FLAGS.items():
        group.add_argument(f"--{name}", type=kind, choices=CHOICES.get(name), help=text)
    group.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="torch.compile: half a minute a length, then faster",
    )


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line names."""
    return {name: getattr(args, name) for name in NAMES if getattr(args, name) is not None}


def read_prompts(path: str, length: int) -> list[str]:
    """The texts with gaps of a prompts file. Raises UserError that names the line of a bad one."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}") from None
    texts = []
    for number, line in enumerate(lines, start=1):
        text = line.removesuffix("\r")
        if not text.strip():
            continue
        if text.lstrip().startswith("{"):
            try:
                found = json.loads(text)
                text = found["prompt"] if "prompt" in found else found["text"]
            except (ValueError, KeyError) as error:
                raise UserError(f"{path}:{number}: expected JSON with `prompt` or `text`, found {error}") from None
            if not isinstance(text, str):
                raise UserError(f"{path}:{number}: the prompt is a {type(text).__name__}, expected a text")
        texts.append(text if GAP.search(text) else f"{text}[MASK:{length}]")
    if not texts:
        raise UserError(f"--prompts {path} holds no prompt")
    return texts


MEASURED = ("text", "nfe", "tokens_per_forward")  # of a record: what only generating tells


def record(completion: Completion, args: argparse.Namespace, settings: SamplingSettings) -> dict[str, Any]:
    """What stands in the JSONL file of a completion."""
    chosen = {name: value for name, value in vars(settings).items() if value is not None and value is not False}
    return {
        "request": completion.request.text,
        "sample": completion.request.sample,
        "text": completion.text,
        "nfe": completion.nfe,
        "tokens_per_forward": round(completion.tokens_per_forward, 3),
        "seed": args.seed,
        "checkpoint": args.checkpoint,
        **({"ignore_eos": True} if args.ignore_eos else {}),
        **chosen,
    }


def open_output(
    args: argparse.Namespace, requests: Sequence[Request], settings: SamplingSettings
) -> tuple[FileIO, int]:
    """(the file of --output, to write after its end; how many of the requests it holds already).

    Raises UserError where it exists without --resume, another process writes it, or it is of another command.
    """
    try:
        mode = "r+b" if args.resume and Path(args.output).exists() else "xb"
        file = open(args.output, mode, buffering=0)  # noqa: SIM115
    except FileExistsError:
        raise UserError(f"{args.output} exists; choose another name, or --resume to continue it") from None
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"another process writes {args.output}") from None
    try:
        done, size = finished(args, requests, settings)
    except UserError:
        file.close()
        raise
    os.truncate(args.output, size)  # a torn last line
    file.seek(size)
    return file, done


def finished(args: argparse.Namespace, requests: Sequence[Request], settings: SamplingSettings) -> tuple[int, int]:
    """(requests that a stopped run has written to --output, bytes of their lines).

    Raises UserError where the file is of other requests or settings.
    """
    lines = Path(args.output).read_bytes().split(b"\n")[:-1]  # what stands after the last end of a line is torn
    if len(lines) > len(requests):
        raise UserError(f"{args.output} has {len(lines)} samples, more than these {len(requests)} requests give")
    for number, (line, asked) in enumerate(zip(lines, requests), start=1):
        expected = record(Completion(asked, "", 0, 0.0, 0.0), args, settings)
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or "request" not in found:
            raise UserError(f"{args.output}:{number} is no sample of this command; choose another --output")
        names = [name for name in {**expected, **found} if name not in MEASURED]
        differing = [name for name in names if found.get(name) != expected.get(name)]
        if differing:
            raise UserError(
                f"{args.output}:{number} has another {differing[0]}; --resume continues the same command alone"
            )
    return len(lines), sum(len(line) + 1 for line in lines)


def rule_of(text: str, flag: str = "--compare") -> dict[str, Any]:
    """The settings that an argument of `flag` stands for: an order, or name=value pairs with commas.

    Raises UserError for others.
    """
    if text in ORDERS:
        return {"order": text}
    found: dict[str, Any] = {}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        try:
            found[name] = FLAGS[name][0](value)
        except (KeyError, ValueError):
            raise UserError(
                f"{flag} {text}: expected {', '.join(ORDERS)} or pairs such as threshold=0.9,block_length=8 of "
                f"{', '.join(FLAGS)}"
            ) from None
    return found


def compare(
    model: Any, tokenizer: Any, requests: Sequence[Request], rules: Sequence[str], args: argparse.Namespace
) -> None:
    """Print the texts by each rule, one beside the other, with what each took."""
    given = given_settings(args)
    chosen = [settings_of(model, {**given, **rule_of(rule)}) for rule in rules]
    list(complete_all(model, tokenizer, requests[:1], args.seed, 1, SamplingSettings(steps=1)))  # first calls are slow
    console = Console(highlight=False, markup=False)
    for asked in requests:
        table = Table(show_lines=True, title=asked.text, title_justify="left")
        for column in ("rule", "calls", "tokens a call", "tokens/s"):
            table.add_column(column, justify="left" if column == "rule" else "right", overflow="fold")
        table.add_column("text", ratio=1)
        for rule, settings in zip(rules, chosen):
            [[c]] = complete_all(model, tokenizer, [asked], args.seed, 1, settings, args.ignore_eos)
            numbers = str(c.nfe), f"{c.tokens_per_forward:.2f}", f"{c.nfe * c.tokens_per_forward / c.seconds:.1f}"
            table.add_row(rule, *numbers, c.text)
        console.print(table)


def append(file: FileIO, records: list[dict[str, Any]], name: str) -> None:
    """Add lines to --output, unbuffered. Raises UserError where the disk is full."""
    lines = "".join(json.dumps(found, ensure_ascii=False) + "\n" for found in records).encode()
    try:
        if file.write(lines) != len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise UserError(f"--output {name}: {error.strerror}; what stands there is kept, --resume continues") from None


def write(
    model: Any, tokenizer: Any, requests: Sequence[Request], args: argparse.Namespace, settings: SamplingSettings
) -> None:
    """Print the samples, or write them to --output as they come, and say at the end what they took."""
    file, done = open_output(args, requests, settings) if args.output else (None, 0)
    few = len(requests) <= args.batch_size
    tokens = calls = 0
    seconds = 0.0
    batches = complete_all(
        model, tokenizer, requests[done:], args.seed, args.batch_size, settings, args.ignore_eos
    )  # fmt: skip
    try:
        with tqdm(total=len(requests), initial=done, unit="text", disable=few or None) as bar:
            for batch in batches:
                if file:
                    append(file, [record(c, args, settings) for c in batch], args.output)
                if few or not file:
                    with bar.external_write_mode(file=sys.stdout):
                        for c in batch:
                            separator = "\n---" if c.request is not requests[-1] else ""
                            print(c.text + separator, flush=True)
                tokens += round(sum(c.nfe * c.tokens_per_forward for c in batch))
                calls += sum(c.nfe for c in batch)
                seconds += batch[0].seconds
                bar.update(len(batch))
    finally:
        if file:
            file.close()
    if calls:
        each = f"{tokens / calls:.2f} tokens a call, {tokens / seconds:.1f} tokens/s"
        print(f"{tokens} tokens, {calls} model calls (NFE), {each}", file=sys.stderr)


@command
def main(argv: list[str] | None = None) -> int:
    """Generate; returns the exit code."""
    parser = make_parser("python -m tools.generate", __doc__)
    parser.add_argument("checkpoint", help="a folder written by tools.export, or a name on the Hub")
    parser.add_argument("--prompt", help="text to continue; default: none, a text from its start")
    parser.add_argument("--length", type=int, default=64, help="tokens after a prompt; default: %(default)s")
    parser.add_argument("--infill", action="append", metavar="TEXT", help="text with [MASK:n] gaps; may be repeated")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt, a text with gaps or a JSON object a line")
    parser.add_argument("--num_samples", type=int, default=1, help="of each text")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text; default: %(default)s")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="texts at a time; changes no text; default: %(default)s"
    )
    parser.add_argument("--output", help="JSONL file, one object a sample; must not exist, but for --resume")
    parser.add_argument("--resume", action="store_true", help="continue an --output that was stopped")
    parser.add_argument("--watch", action="store_true", help="show the text in the terminal while it is unmasked")
    parser.add_argument("--compare", nargs="+", metavar="RULE", help="several rules beside each other; see above")
    parser.add_argument("--ignore_eos", action="store_true", help="let no end-of-text token end a text")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code in the checkpoint")
    add_rules(parser)
    args = parser.parse_args(argv)
    texts = requested_texts(args)
    model, tokenizer = load(args.checkpoint, args.trust_remote_code)
    samples = itertools.chain.from_iterable([text] * args.num_samples for text in texts)
    numbers: Counter[str] = Counter()
    requests = []
    for text in samples:  # a text that stands there twice gets other samples the second time
        requests.append(request(text, model, tokenizer, numbers[text]))
        numbers[text] += 1
    if args.compare:
        compare(model, tokenizer, requests, args.compare, args)
        return 0
    settings = settings_of(model, given_settings(args))
    if args.watch:
        for asked in requests:
            watch(model, tokenizer, asked, args.seed, settings, args.ignore_eos)
        return 0
    write(model, tokenizer, requests, args, settings)
    return 0


def requested_texts(args: argparse.Namespace) -> list[str]:
    """The texts with gaps that the command line asks for. Raises UserError for flags that do not go together."""
    for name in ("length", "num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}, expected at least 1")
    sources = [f"--{name}" for name in ("prompt", "infill", "prompts") if getattr(args, name) is not None]
    if len(sources) > 1:
        raise UserError(f"{' and '.join(sources)} each say what to write; give one of them")
    if args.resume and not args.output:
        raise UserError("--resume continues an --output, which is not given")
    if args.output and (args.watch or args.compare):
        raise UserError("--watch and --compare show texts in the terminal, and --output is for a file")
    if args.watch and args.compare:
        raise UserError("--watch and --compare each show texts in the terminal; give one of them")
    if args.output and Path(args.output).is_dir():
        raise UserError(f"--output {args.output} is a folder, expected a file")
    if args.output and Path(args.output).exists() and not args.resume:
        raise UserError(f"{args.output} exists; choose another name, or --resume to continue it")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {Path(args.output).parent}")
    for rule in args.compare or []:
        rule_of(rule)
    if args.prompts is not None:
        return read_prompts(args.prompts, args.length)
    return args.infill or [f"{args.prompt or ''}[MASK:{args.length}]"]


if __name__ == "__main__":
    sys.exit(main())
