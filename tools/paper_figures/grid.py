"""What a command line asks to be measured, checked before any model is loaded."""

import argparse
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from pretrain.model.settings import SamplingSettings

from ..decoding import GAP
from ..generate import read_prompts, rule_of
from ..loading import fingerprint
from .autoregressive import check_autoregressive, check_diffusion, position_limit


def check_at_least_one(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise UserError for a number below 1 in these arguments, each a number or a list of numbers."""
    for name in names:
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number < 1:
                raise UserError(f"--{name} has {number}, expected at least 1")


def check_rules(rules: Sequence[str], apart: dict[str, str]) -> None:
    """Raise UserError for a rule that is unknown, impossible, or names a setting of `apart`: {setting: its flag}."""
    for rule in rules:
        chosen: dict[str, Any] = rule_of(rule, "--rules")
        for name, flag in apart.items():
            if name in chosen:
                raise UserError(f"--rules {rule} names {name}; give it by {flag}")
        try:
            SamplingSettings(**{name: value for name, value in chosen.items() if value not in (0, "none")})
        except ValueError as error:
            raise UserError(f"--rules {rule}: {error}") from None


def check_room(name: str, config: Any, tokens: int) -> None:
    """Raise UserError where a model takes fewer positions than a start token and so many tokens."""
    limit = position_limit(config)
    if limit and tokens + 1 > limit:
        raise UserError(f"{name} takes {limit} tokens, --length {tokens} and a start token are more")


def described(kind: str, checkpoint: str, **settings: Any) -> dict[str, Any]:
    """A point: what writes, and how."""
    return {"kind": kind, "checkpoint": checkpoint, "identity": fingerprint(checkpoint), **settings}


def quality_grid(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """(points to measure, one text with a gap at its end for each text of a point). Raises UserError."""
    check_at_least_one(args, ("steps", "length", "texts", "batch_size"))
    for temperature in args.temperatures:
        if not 0 <= temperature < float("inf"):
            raise UserError(f"--temperatures has {temperature}, expected 0 or more")
    check_rules(args.rules, {"steps": "--steps", "temperature": "--temperatures"})
    prompts = continuations(args.prompts, args.length) if args.prompts else [f"[MASK:{args.length}]"]
    for checkpoint in args.checkpoints:
        check_room(checkpoint, check_diffusion(checkpoint), args.length)
    for flag, name in [("--judge", args.judge), *(("--also", name) for name in args.also)]:
        check_room(name, check_autoregressive(name, flag), args.length)
    points = [
        described("diffusion", checkpoint, rule=rule, temperature=temperature, steps=steps)
        for checkpoint, rule, temperature, steps in itertools.product(
            unique(args.checkpoints), unique(args.rules), unique(args.temperatures), sorted(set(args.steps))
        )
    ]
    points += [
        described("autoregressive", name, temperature=temperature)
        for name, temperature in itertools.product(unique(args.also), unique(args.temperatures))
    ]
    return points, [prompts[i % len(prompts)] for i in range(args.texts)]


def speed_grid(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Points to measure. Raises UserError."""
    check_at_least_one(args, ("steps", "lengths", "repeats"))
    check_rules(args.rules, {"steps": "--steps"})
    check_room(args.checkpoint, check_diffusion(args.checkpoint), max(args.lengths))
    if args.base:
        check_room(args.base, check_autoregressive(args.base, "--base"), max(args.lengths))
    lengths, steps = sorted(set(args.lengths)), sorted(set(args.steps))
    points = [
        described("diffusion", args.checkpoint, rule=rule, length=length, steps=count)
        for rule, length, count in itertools.product(unique(args.rules), lengths, steps)
    ]
    if args.base:
        points += [described("autoregressive", args.base, length=length) for length in lengths]
    return points


def continuations(path: str, length: int) -> list[str]:
    """The prompts of a file, each with a gap of `length` tokens after it. Raises UserError for a gap elsewhere."""
    texts = read_prompts(path, length)
    for text in texts:
        if GAP.sub("", text) + f"[MASK:{length}]" != text:
            raise UserError(f"--prompts {path}: expected texts to continue, found one with a gap of its own: {text!r}")
    return texts


def digest_of(path: str | None) -> str | None:
    """A short hash of a prompts file; None for texts from nothing."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else None


def unique(values: Sequence[Any]) -> list[Any]:
    """Each value once, in the order given."""
    return list(dict.fromkeys(values))


def labels(names: Sequence[str]) -> dict[str, str]:
    """Of each checkpoint the shortest end of its path that no other has, for legends and tables."""
    found = {}
    for name in dict.fromkeys(names):
        parts = Path(name).parts
        others = [Path(other).parts for other in dict.fromkeys(names) if other != name]
        counts = range(1, len(parts) + 1)
        enough = (n for n in counts if all(other[-n:] != parts[-n:] for other in others))
        found[name] = "/".join(parts[-next(enough, len(parts)) :])
    return found
