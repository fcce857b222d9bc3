"""Decoding as pictures in HTML: one frame a step, each token coloured by its confidence or by its step."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.model.sampling import State

from .decoding import pieces

GIVEN, MASK, FOUND = "given", "mask", "found"
COLOURS = ("confidence", "step")


@dataclass(frozen=True)
class Token:
    """What stands at a position in a frame. `confidence` and `step` are those of its commit; only of found tokens."""

    piece: str
    kind: str
    confidence: float = 0.0
    step: int = 0
    new: bool = False


@dataclass(frozen=True)
class Frame:
    """The tokens after a step, and the model calls up to it."""

    tokens: list[Token]
    calls: int

    @property
    def found(self) -> int:
        return sum(token.kind == FOUND for token in self.tokens)

    @property
    def missing(self) -> int:
        return sum(token.kind == MASK for token in self.tokens)


class Film:
    """The frames of one text, made as its states come."""

    def __init__(self, ids: Sequence[int], tokenizer: Any, mask_token_id: int):
        self.tokenizer, self.mask = tokenizer, mask_token_id
        self.given = [token != mask_token_id for token in ids]
        self.steps = [0] * len(self.given)
        self.frames = [self._frame(list(ids), [0.0] * len(self.given), [False] * len(self.given), 0)]

    def add(self, state: State) -> Frame:
        """The frame of the next state, of a batch of one."""
        committed = state.committed[0].tolist()
        number = len(self.frames)
        self.steps = [number if new else step for new, step in zip(committed, self.steps)]
        confidence = state.confidence[0].nan_to_num().tolist()
        self.frames.append(self._frame(state.ids[0].tolist(), confidence, committed, int(state.nfe[0])))
        return self.frames[-1]

    def _frame(self, ids: list[int], confidence: list[float], committed: list[bool], calls: int) -> Frame:
        tokens = []
        for k, (token, piece) in enumerate(zip(ids, pieces(ids, self.tokenizer, self.mask))):
            if self.given[k]:
                tokens.append(Token(piece, GIVEN))
            elif token == self.mask:
                tokens.append(Token(piece, MASK))
            else:
                tokens.append(Token(piece, FOUND, confidence[k], self.steps[k], committed[k]))
        return Frame(tokens, calls)


def render(frame: Frame, colour: str, steps: int) -> str:
    """HTML of a frame. All text is escaped. `steps` is the number that the last colour of "step" stands for."""
    parts = []
    for token in frame.tokens:
        text = html.escape(token.piece).replace("\n", "<br>")
        if token.kind == GIVEN:
            parts.append(f'<span class="given">{text}</span>')
        elif token.kind == MASK:
            parts.append('<span class="mask">\N{LIGHT SHADE}</span>')
        else:
            share = token.confidence if colour == "confidence" else token.step / max(1, steps)
            title = f"probability {token.confidence:.2f}, step {token.step}"
            new = " new" if token.new else ""
            parts.append(f'<span class="found{new}" style="background:{shade(share)}" title="{title}">{text}</span>')
    return f'<div class="text" data-masks="{frame.missing}" data-found="{frame.found}">{"".join(parts)}</div>'


def shade(share: float) -> str:
    """A colour from orange (0) over white to blue (1), which differ for colour-blind eyes too."""
    share = min(1.0, max(0.0, share))
    hue, strength = (28, 1 - 2 * share) if share < 0.5 else (210, 2 * share - 1)
    return f"hsl({hue} 85% {100 - 32 * strength:.0f}%)"


def legend(colour: str) -> str:
    """HTML of the scale that `render` colours by."""
    low, high = ("unsure", "sure") if colour == "confidence" else ("first", "last")
    scale = ", ".join(shade(k / 10) for k in range(11))
    return f'<div class="legend">{low} <span style="background:linear-gradient(90deg, {scale})"></span> {high}</div>'


CSS = """
.text {font-size: 1.15rem; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere; min-height: 9rem;
       color: #1a1a1a; background: #fff; padding: 0.8rem; border-radius: 6px}
.text .found {border-radius: 3px; color: #1a1a1a}
.text .new {outline: 2px solid #2b6cb0}
.text .mask {color: #9a9a9a}
.text .given {color: #555}
.legend {font-size: 0.85rem; display: flex; gap: 0.5rem; align-items: center}
.legend span {display: inline-block; width: 12rem; height: 0.8rem; border-radius: 4px}
.facts, .trouble {font-variant-numeric: tabular-nums; min-height: 1.6rem}
.trouble {color: #b00020; font-weight: 600}
"""
