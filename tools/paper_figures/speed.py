"""Figure 4 and the table "Decoding speed": seconds for one sequence over its length and the decoding steps T.

In: a diffusion checkpoint and, with --base, an AR model, which writes with its KV cache. Out: FOLDER/speed.json with
each repeat of every point, speed.png, speed.md. The texts come from the start token alone, one at a time, and no
end-of-text token ends one, so all have the length asked for.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..decoding import Request, complete_all, load, request, settings_of
from ..generate import rule_of
from .autoregressive import continue_all, load_autoregressive
from .folder import PointFolder
from .grid import speed_grid
from .speed_report import figure, page

Writer = Callable[[int], float]  # the number of the repeat -> model calls

BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left"
WARM_UP_TOKENS = 8  # of a text that is written first and not timed


def speed(args: argparse.Namespace) -> int:
    """Measure what FOLDER lacks, draw all that it holds, and print the paths; returns the exit code.

    Raises UserError for bad input, if possible before a model is loaded.
    """
    points = speed_grid(args)
    shared = {"checkpoint": args.checkpoint, "repeats": args.repeats, **device_in_words()}
    folder = PointFolder(args.output, "speed", shared)
    folder.complete(points, lambda missing: measure(folder, missing, args.repeats), page, figure)
    return 0


def device_in_words() -> dict[str, Any]:
    """{"device": the name of the GPU or CPU, "threads": torch's on a CPU, else None}."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "threads": None}
    try:
        named = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        named = None
    return {"device": named[1] if named else "CPU", "threads": torch.get_num_threads()}


def measure(folder: PointFolder, points: list[dict[str, Any]], repeats: int) -> None:
    """Time each point. The bar counts tokens written × model calls, so its time left holds for all steps."""
    with tqdm(total=sum(map(weight, points)) * repeats, bar_format=BAR) as bar:
        for checkpoint in dict.fromkeys(point["checkpoint"] for point in points):
            own = [point for point in points if point["checkpoint"] == checkpoint]
            loaded = load(checkpoint) if own[0]["kind"] == "diffusion" else load_autoregressive(checkpoint, "--base")
            settings = [point_settings(loaded[0], point) for point in own]  # bad ones are told before any is measured
            for point, chosen in zip(own, settings):
                steps = f", {point['steps']} steps" if "steps" in point else ""
                bar.set_description(f"{point.get('rule', 'autoregressive')}, {point['length']} tokens{steps}")
                writer_of(*loaded, chosen, min(point["length"], WARM_UP_TOKENS))(0)
                write = writer_of(*loaded, chosen, point["length"])
                seconds, calls = [], []
                for repeat in range(repeats):
                    spent, made = timed(write, repeat, loaded[0].device)
                    seconds.append(spent)
                    calls.append(made)
                    bar.update(weight(point))
                folder.add(
                    point,
                    {
                        "seconds": seconds,
                        "median": statistics.median(seconds),
                        "nfe": statistics.mean(calls),
                        "dtype": str(loaded[0].dtype).removeprefix("torch."),
                    },
                )
            del loaded


def weight(point: dict[str, Any]) -> int:
    """About what a point costs: positions × model calls; with a KV cache a call has one position."""
    return point["length"] * min(point.get("steps", 1), point["length"])


def point_settings(model: Any, point: dict[str, Any]) -> Any:
    """SamplingSettings of a diffusion point, None for an AR model. Raises UserError for impossible ones."""
    if point["kind"] != "diffusion":
        return None
    return settings_of(model, {**rule_of(point["rule"], "--rules"), "steps": point["steps"]})


def writer_of(model: Any, tokenizer: Any, settings: Any, length: int) -> Writer:
    """Writes one sequence of `length` tokens from the start token; an AR model with its KV cache, at temperature 1."""
    text = f"[MASK:{length}]"

    def write(repeat: int) -> float:
        if settings is None:
            [[done]] = continue_all(model, tokenizer, [Request(text, [])], repeat, 1, 1.0, length)
        else:
            asked = [request(text, model, tokenizer)]
            [[done]] = complete_all(model, tokenizer, asked, repeat, 1, settings, ignore_eos=True)
        return done.nfe

    return write


def timed(write: Writer, repeat: int, device: torch.device) -> tuple[float, float]:
    """(seconds until the device is done, model calls)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    calls = write(repeat)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, calls
