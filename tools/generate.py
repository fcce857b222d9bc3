"""Text from an exported diffusion model: continue a prompt, or fill gaps.

    python -m tools.generate exports/demo --prompt "Once upon a time" --length 64 --seed 1
    python -m tools.generate exports/demo --infill "There was a [MASK:6] who lived in a castle." --order entropy
    python -m tools.generate exports/demo --prompts prompts.txt --length 64 --batch_size 16 --output samples.jsonl
    python -m tools.generate exports/demo --prompt "Once upon a time" --watch
    python -m tools.generate exports/demo --prompt "Once" --compare random entropy threshold=0.9,cache=window

[MASK:n] stands for n unknown tokens; a text may have several. A line of a prompts file is a text to continue, a text
with gaps, or a JSON object with `prompt` or `text`. A sample depends on --seed, its text and its number alone: the
same in any batch, and in a file of any length. With --resume a stopped --output is continued.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from common.cli import command, make_parser
from common.errors import UserError
from pretrain.model.rules import ORDERS
from pretrain.model.settings import NAMES, SamplingSettings

from .decoding import GAP, Completion, Request, complete_all, load, request
from .watch import watch

FLAGS: dict[str, tuple[type, str]] = {
    "steps": (int, "the most model calls a text takes; default: one a token"),
    "temperature": (float, "0 takes the most probable token; default: 1"),
    "top_k": (int, "draw from the k most probable tokens"),
    "top_p": (float, "draw from the most probable tokens that hold this share of probability"),
    "min_p": (float, "draw from tokens with this share of the best one's probability, or more"),
    "repetition_penalty": (float, "above 1, tokens that are there already become less likely"),
    "order": (str, "which masks are filled first; default: random, with a rule below what that rule ranks by"),
    "block_length": (int, "fill so many masks at a time, from left to right"),
    "threshold": (float, "a step also takes all tokens of a higher probability (Fast-dLLM); 0.9 is usual"),
    "factor": (float, "a step takes n tokens if (n + 1)(1 - the n-th probability) is less (Fast-dLLM)"),
    "entropy_bound": (float, "a step takes tokens while their entropies sum up to less, in nats"),
    "kl_threshold": (float, "with --threshold: only where the prediction has moved less for two steps (KLASS)"),
    "verify_threshold": (float, "with --threshold: take tokens back that are less likely in context (WINO); 0.9"),
    "remasking": (float, "take a token of probability p back with this probability times 1 - p (ReMDM)"),
    "cache": (str, "window: compute the block alone between full passes; faster, an approximation"),
    "refresh_every": (int, "with --cache: a full pass every so many steps of a block; default: at its first"),
}
CHOICES = {"order": ORDERS, "cache": ("window",)}


def add_rules(parser: argparse.ArgumentParser) -> None:
    """The flags of SamplingSettings."""
    group = parser.add_argument_group(
        "how to decode", "what is not given is as generation_config.json of the checkpoint says"
    )
    for name, (kind, text) in FLAGS.items():
        group.add_argument(f"--{name}", type=kind, choices=CHOICES.get(name), help=text)
    group.add_argument(
        "--compile", action="store_true", default=None, help="torch.compile; pays for long texts on a GPU"
    )


def settings_of(model: Any, given: dict[str, Any]) -> SamplingSettings:
    """The settings given, and for the others the checkpoint's defaults. Raises UserError for bad ones."""
    defaults = getattr(model, "generation_config", None)
    chosen = {name: getattr(defaults, name, None) for name in NAMES}
    chosen.update({name: value for name, value in given.items() if value is not None})
    try:
        return SamplingSettings(**{name: value for name, value in chosen.items() if value is not None})
    except ValueError as error:
        raise UserError(str(error)) from None


def read_prompts(path: str, length: int) -> list[str]:
    """The texts with gaps of a prompts file. Raises UserError that names the line of a bad one."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}") from None
    texts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        text = line
        if line.lstrip().startswith("{"):
            try:
                found = json.loads(line)
                text = found["prompt"] if "prompt" in found else found["text"]
            except (ValueError, KeyError) as error:
                raise UserError(f"{path}:{number}: expected JSON with `prompt` or `text`, found {error}") from None
            if not isinstance(text, str):
                raise UserError(f"{path}:{number}: the prompt is a {type(text).__name__}, expected a text")
        texts.append(text if GAP.search(text) else f"{text}[MASK:{length}]")
    if not texts:
        raise UserError(f"--prompts {path} holds no prompt")
    return texts


def record(completion: Completion, seed: int, settings: SamplingSettings) -> dict[str, Any]:
    """What stands in the JSONL file of a completion."""
    chosen = {name: value for name, value in vars(settings).items() if value not in (None, False)}
    return {
        "request": completion.request.text,
        "sample": completion.request.sample,
        "text": completion.text,
        "nfe": completion.nfe,
        "tokens_per_forward": round(completion.tokens_per_forward, 3),
        "seed": seed,
        **chosen,
    }


def finished(output: Path, requests: Sequence[Request], seed: int, settings: SamplingSettings) -> int:
    """How many of the requests a stopped run has written to `output`; a torn last line is cut off.

    Raises UserError where the file is of other requests or settings.
    """
    whole = output.read_bytes().rpartition(b"\n")[0]
    lines = whole.decode("utf-8").splitlines() if whole else []
    if len(lines) > len(requests):
        raise UserError(f"{output} has {len(lines)} samples, more than these {len(requests)} requests give")
    for number, (line, asked) in enumerate(zip(lines, requests), start=1):
        expected = record(Completion(asked, "", 0, 0.0, 0.0), seed, settings)
        try:
            found = json.loads(line)
            differing = [
                k for k in expected if k not in ("text", "nfe", "tokens_per_forward") and found[k] != expected[k]
            ]
            differing += [k for k in found if k not in expected]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{output}:{number} is no sample of this command ({error}); choose another --output"
            ) from None
        if differing:
            raise UserError(f"{output}:{number} has another {differing[0]}; --resume continues the same command alone")
    output.write_bytes(whole + b"\n" if whole else b"")
    return len(lines)


def rule_of(text: str) -> dict[str, Any]:
    """The settings that an argument of --compare stands for: an order, or name=value pairs with commas."""
    if text in ORDERS:
        return {"order": text}
    found: dict[str, Any] = {}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        try:
            found[name] = FLAGS[name][0](value)
        except (KeyError, ValueError):
            raise UserError(
                f"--compare {text}: expected {', '.join(ORDERS)} or pairs such as threshold=0.9,block_length=8 of "
                f"{', '.join(FLAGS)}"
            ) from None
    return found


def compare(model: Any, tokenizer: Any, texts: Sequence[str], rules: Sequence[str], args: argparse.Namespace) -> None:
    """Print the texts by each rule, one beside the other, with what each took."""
    given = {name: getattr(args, name) for name in NAMES}
    chosen = [settings_of(model, {**given, **rule_of(rule)}) for rule in rules]
    requests = [request(text, model, tokenizer) for text in texts]
    warm_up = SamplingSettings(steps=1)
    list(complete_all(model, tokenizer, requests[:1], args.seed, 1, warm_up))  # first calls are slow
    console = Console(highlight=False, markup=False)
    for asked in requests:
        table = Table(show_lines=True, title=asked.text, title_justify="left")
        for column in ("rule", "calls", "tokens a call", "tokens/s"):
            table.add_column(column, justify="left" if column == "rule" else "right", overflow="fold")
        table.add_column("text", ratio=1)
        for rule, settings in zip(rules, chosen):
            [[c]] = complete_all(model, tokenizer, [asked], args.seed, 1, settings)
            numbers = str(c.nfe), f"{c.tokens_per_forward:.2f}", f"{c.nfe * c.tokens_per_forward / c.seconds:.1f}"
            table.add_row(rule, *numbers, c.text)
        console.print(table)


def write(
    model: Any, tokenizer: Any, requests: Sequence[Request], args: argparse.Namespace, settings: SamplingSettings
) -> None:
    """Print the samples, or write them to --output as they come, and say at the end what they took."""
    output = Path(args.output) if args.output else None
    done = finished(output, requests, args.seed, settings) if output and output.exists() else 0
    file = output.open("a", encoding="utf-8") if output else None
    tokens = calls = 0
    seconds = 0.0
    bar = tqdm(total=len(requests), initial=done, unit="text", disable=len(requests) <= args.batch_size or None)
    for batch in complete_all(model, tokenizer, requests[done:], args.seed, args.batch_size, settings):
        for c in batch:
            if file:
                file.write(json.dumps(record(c, args.seed, settings), ensure_ascii=False) + "\n")
            if not file or len(requests) <= args.batch_size:
                with bar.external_write_mode(file=sys.stdout):
                    print(c.text + ("\n---" if len(requests) > 1 and c.request is not requests[-1] else ""), flush=True)
            tokens, calls = tokens + round(c.nfe * c.tokens_per_forward), calls + c.nfe
        if file:
            file.flush()
        seconds += batch[0].seconds
        bar.update(len(batch))
    bar.close()
    if file:
        file.close()
    if calls:
        speed = f"{tokens / seconds:.1f} tokens/s" if seconds else ""
        print(
            f"{tokens} tokens, {calls} model calls (NFE), {tokens / calls:.2f} tokens a call, {speed}", file=sys.stderr
        )


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
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code in the checkpoint")
    add_rules(parser)
    args = parser.parse_args(argv)
    texts = requested_texts(args)
    model, tokenizer = load(args.checkpoint, args.trust_remote_code)
    if args.compare:
        compare(model, tokenizer, texts, args.compare, args)
        return 0
    settings = settings_of(model, {name: getattr(args, name) for name in NAMES})
    requests = [request(text, model, tokenizer, k) for text in texts for k in range(args.num_samples)]
    if args.watch:
        for asked in requests:
            watch(model, tokenizer, asked, args.seed, settings)
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
    if args.output and Path(args.output).exists() and not args.resume:
        raise UserError(f"{args.output} exists; choose another name, or --resume to continue it")
    for rule in args.compare or []:
        rule_of(rule)
    if args.prompts is not None:
        return read_prompts(args.prompts, args.length)
    return args.infill or [f"{args.prompt or ''}[MASK:{args.length}]"]


if __name__ == "__main__":
    sys.exit(main())
