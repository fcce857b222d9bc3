"""Figures 3 and 5: generative perplexity × distinct-2 over decoding steps and sampling settings.

In: diffusion checkpoints, an AR judge. Out: FOLDER/quality.json with every point and its texts, quality.png and
quality.md.
A point is a checkpoint at a rule, a temperature and a number of steps.

All texts have exactly --length tokens of the writer: an end-of-text token does not end one, since distinct-2 falls
with the amount of text. The judge reads what the writer's tokenizer decodes, without special tokens.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from common.errors import UserError

from ..decoding import Completion, Request, complete_all, load, request, settings_of
from ..generate import rule_of
from ..loading import fingerprint
from .autoregressive import context_of, continue_all, load_autoregressive, prompt_ids
from .folder import PointFolder
from .grid import digest_of, quality_grid
from .perplexity import Judge, distinct_2, perplexity
from .quality_report import figure, page


def quality(args: argparse.Namespace) -> int:
    """Measure what FOLDER lacks, draw all that it holds, and print the paths; returns the exit code.

    Raises UserError for bad input, if possible before a model is loaded.
    """
    points, texts = quality_grid(args)
    judge = {"judge": args.judge, "judge_weights": fingerprint(args.judge)}
    shared = {**judge, "length": args.length, "texts": args.texts, "seed": args.seed}
    folder = PointFolder(args.output, "quality", {**shared, "prompts": digest_of(args.prompts)})
    folder.complete(points, lambda missing: measure(folder, missing, texts, args), page, figure)
    return 0


def measure(folder: PointFolder, points: list[dict[str, Any]], texts: list[str], args: argparse.Namespace) -> None:
    """Write and judge the texts of each point. The bar counts model calls, so its time left holds for all steps."""
    judge = Judge(*load_autoregressive(args.judge, "--judge"), name=args.judge, batch_size=args.batch_size)
    total = sum(calls_of(point, args.length) for point in points) * len(texts)
    with tqdm(total=total, unit="call") as bar:
        for checkpoint in dict.fromkeys(point["checkpoint"] for point in points):
            own = [point for point in points if point["checkpoint"] == checkpoint]
            writer = load_autoregressive(checkpoint, "--also") if own[0]["kind"] != "diffusion" else load(checkpoint)
            planned = [(point, settings_for(writer[0], point)) for point in own]
            for point, settings in planned:
                bar.set_description(f"{checkpoint.rstrip('/').rpartition('/')[2]} {short(point)}")
                completions = []
                for batch in written(point, settings, *writer, texts, args):
                    completions += batch
                    bar.update(calls_of(point, args.length) * len(batch))
                folder.add(point, result(completions, settings, *writer, judge))
            del writer


def settings_for(model: Any, point: dict[str, Any]) -> Any:
    """SamplingSettings of a diffusion point: its own, else the checkpoint's defaults. None for an AR model."""
    if point["kind"] != "diffusion":
        return None
    given = {"steps": point["steps"], "temperature": point["temperature"]}
    return settings_of(model, {**rule_of(point["rule"], "--rules"), **given})


def written(
    point: dict[str, Any], settings: Any, model: Any, tokenizer: Any, texts: Sequence[str], args: argparse.Namespace
) -> Iterator[list[Completion]]:
    """The texts of a point, a batch at a time. The same text the second time is another sample."""
    numbers: Counter[str] = Counter()
    requests = []
    for text in texts:
        if settings is None:
            check_room_after(prompt_ids(tokenizer, text), model, args)
            requests.append(Request(text, [], numbers[text]))
        else:
            requests.append(request(text, model, tokenizer, numbers[text]))
        numbers[text] += 1
    if settings is None:
        return continue_all(
            model, tokenizer, requests, args.seed, args.batch_size, point["temperature"], args.length
        )  # fmt: skip
    return complete_all(model, tokenizer, requests, args.seed, args.batch_size, settings, ignore_eos=True)


def check_room_after(ids: list[int], model: Any, args: argparse.Namespace) -> None:
    """Raise UserError where an AR model takes fewer tokens than a prompt and --length."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and len(ids) + args.length > limit:
        raise UserError(f"{len(ids)} tokens of a prompt and --length {args.length}, but the model takes {limit}")


def result(
    completions: Sequence[Completion], settings: Any, model: Any, tokenizer: Any, judge: Judge
) -> dict[str, Any]:
    """What quality.json has of a point: its numbers, the settings in force, and of each text what it took."""
    contexts = []
    for c in completions:
        if settings is None:
            ids = prompt_ids(tokenizer, c.request.text)
        else:
            ids = c.request.ids[: c.request.ids.index(model.config.mask_token_id)]
        contexts.append(context_of(ids, tokenizer))
    judged = judge.judge([(context, c.text) for context, c in zip(contexts, completions)])
    value, error = perplexity([j.nats for j in judged], [len(j.tokens) for j in judged])
    chosen = {} if settings is None else {k: v for k, v in vars(settings).items() if v is not None and v is not False}
    return {
        "perplexity": value,
        "perplexity_error": error,
        "distinct_2": distinct_2([j.tokens for j in judged]),
        "nfe": sum(c.nfe for c in completions) / len(completions),
        "judged_tokens": sum(len(j.tokens) for j in judged),
        "settings": chosen,
        "texts": [
            {"context": context, "text": c.text, "nfe": c.nfe, "nats": j.nats, "judged_tokens": len(j.tokens)}
            for context, c, j in zip(contexts, completions, judged)
        ],
    }


def calls_of(point: dict[str, Any], length: int) -> int:
    """Model calls of a text at most; a call with a KV cache is cheap, and counts as if a text took one."""
    return min(point["steps"], length) if point["kind"] == "diffusion" else 1


def short(point: dict[str, Any]) -> str:
    """A point's settings, for the progress bar."""
    steps = f"{point['rule']}, {point['steps']} steps, " if point["kind"] == "diffusion" else ""
    return f"{steps}temperature {point['temperature']:g}"
