"""The text in the terminal while it is unmasked."""

import time
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pretrain.model.sampling import State
from pretrain.model.settings import SamplingSettings

from .decoding import Request, pieces

GIVEN, FOUND, NEW, MASK = "default", "bright_white", "bold green", "dim yellow"


def page(state: State, row: list[int], tokenizer: Any, mask_token_id: int, step: int) -> Group:
    """What stands after a step: given text, found text, what is new in bold, and what is missing."""
    text = Text()
    masked, committed = state.masked[0].tolist(), state.committed[0].tolist()
    for piece, token, missing, new in zip(
        pieces(state.ids[0].tolist(), tokenizer, mask_token_id), row, masked, committed
    ):
        style = MASK if missing else NEW if new else FOUND if token == mask_token_id else GIVEN
        text.append(piece, style)
    left, calls = sum(masked), int(state.nfe[0])
    found = row.count(mask_token_id) - left
    line = f"step {step}   {calls} model calls   {found / max(1, calls):.2f} tokens a call   {left} masks left"
    return Group(text, Text(line, "dim"))


@torch.no_grad()
def watch(
    model: Any, tokenizer: Any, request: Request, seed: int, settings: SamplingSettings, ignore_eos: bool = False
) -> None:
    """Fill a request and show each step in its place; where the output is no terminal, each step on its own lines."""
    console = Console(highlight=False)
    ends = {"eos_token_id": -1} if ignore_eos else {}
    states = model.diffusion_states(
        torch.tensor([request.ids], device=model.device), generator=request.generator(seed), **vars(settings), **ends
    )
    mask = model.config.mask_token_id
    began = time.perf_counter()
    with Live(console=console, auto_refresh=False) as live:
        for step, state in enumerate(states, start=1):
            shown = page(state, request.ids, tokenizer, mask, step)
            if console.is_terminal:
                live.update(shown, refresh=True)
            else:
                console.print(shown)
    console.print(Text(f"{time.perf_counter() - began:.1f} s", "dim"))
