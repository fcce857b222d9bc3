"""Generative perplexity under an autoregressive judge of written texts.

The judge has its own tokenizer: a written text is tokenised anew with it. Only tokens that the writer wrote count:
those after the longest common beginning of the judge's tokens of the prompt and of the whole text, so a token that
holds the end of the prompt and the beginning of what was written counts as written. A text from nothing gets the
judge's start token in front (else its end-of-text token), so that its first token is predicted too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from common.errors import UserError

from ..evaluation.text_metrics import distinct_n
from .autoregressive import position_limit, start_of_text


@dataclass(frozen=True)
class Judged:
    """What the judge says of a text."""

    tokens: list[int]  # the judge's tokens of what was written
    nats: float  # their negative log-likelihood, summed


class Judge:
    """An AR model, its tokenizer, and how many texts it reads at a time."""

    def __init__(self, model: Any, tokenizer: Any, name: str, batch_size: int = 8):
        self.model, self.tokenizer, self.name, self.batch_size = model, tokenizer, name, batch_size

    def ids(self, context: str, text: str) -> tuple[list[int], int]:
        """(the judge's tokens of the whole text, how many of them are given and not scored).

        Raises UserError for a text longer than the judge takes.
        """
        plain: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True}
        whole = self.tokenizer(text, **plain)["input_ids"]
        given = 0
        for a, b in zip(whole, self.tokenizer(context, **plain)["input_ids"] if context else []):
            if a != b:
                break
            given += 1
        start = start_of_text(self.tokenizer)
        if start is not None:
            whole, given = [start, *whole], given + 1
        limit = position_limit(self.model.config)
        if limit and len(whole) > limit:
            raise UserError(
                f"a text has {len(whole)} tokens of the judge {self.name}, which takes {limit}; "
                "choose a smaller --length or another --judge"
            )
        return whole, max(given, 1) if whole else 0

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Judged]:
        """Of each (context, whole text), the written tokens and their nats."""
        found = []
        for begin in range(0, len(pairs), self.batch_size):
            rows = [self.ids(context, text) for context, text in pairs[begin : begin + self.batch_size]]
            nats = self.nats([row for row, _ in rows], [given for _, given in rows])
            found += [Judged(row[given:], value) for (row, given), value in zip(rows, nats)]
        return found

    @torch.no_grad()
    def nats(self, rows: Sequence[list[int]], given: Sequence[int]) -> list[float]:
        """The nats of each row from its token number `given` on. Padding is on the right, where no token looks."""
        width = max(map(len, rows))
        if width < 2:
            return [0.0] * len(rows)
        device = self.model.device
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)  # (B, L)
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        real[:, 0] = 1  # an empty row attends to something
        logits = self.model(input_ids=ids, attention_mask=real).logits  # (B, L, V)
        found = []
        for logit, row, first in zip(logits, rows, given):
            if len(row) <= first:
                found.append(0.0)
                continue
            targets = torch.tensor(row[first:], device=device)
            loss = F.cross_entropy(logit[first - 1 : len(row) - 1].float(), targets, reduction="none")
            found.append(float(loss.double().sum()))
        return found


def perplexity(nats: Sequence[float], tokens: Sequence[int]) -> tuple[float | None, float | None]:
    """(exp of the mean nats a token, its standard error), from each text's nats and number of tokens.

    The mean is over all tokens of all texts. Its error is that of a ratio of two sums over independent texts, and of
    its exponential, both by the delta method. None where there is nothing to divide by, or one text alone.
    """
    count, total = len(tokens), sum(tokens)
    if not total:
        return None, None
    mean = sum(nats) / total
    value = math.exp(mean)
    if count < 2:
        return value, None
    squares = sum((n - mean * t) ** 2 for n, t in zip(nats, tokens))
    return value, value * math.sqrt(squares * count / (count - 1)) / total


def distinct_2(texts: Sequence[Sequence[int]]) -> float | None:
    """`distinct_n` of pairs; None where no text has a pair, since 0 would mean repetition."""
    return distinct_n(texts, 2) if any(len(text) > 1 for text in texts) else None
