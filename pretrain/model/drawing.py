"""From logits to tokens: filters of transformers, one uniform number a token, and what the rules ask about it."""

from collections.abc import Sequence

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

GREEDY_BELOW = 1e-4  # lower temperatures divide logits out of range; they take the most probable token


def warpers(
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> LogitsProcessorList:
    """transformers' own, in the order of its `generate`; those that would change nothing are left out."""
    chosen = LogitsProcessorList()
    if repetition_penalty is not None and repetition_penalty != 1:
        chosen.append(RepetitionPenaltyLogitsProcessor(penalty=float(repetition_penalty)))
    if temperature < GREEDY_BELOW:
        return chosen
    if temperature != 1.0:
        chosen.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        chosen.append(TopKLogitsWarper(int(top_k)))
    if top_p is not None and top_p < 1:
        chosen.append(TopPLogitsWarper(top_p))
    if min_p:
        chosen.append(MinPLogitsWarper(min_p))
    return chosen


def invert(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(N,): for each row of `logits` (N, V) the token at which its cumulative probability passes `uniform` (N,).

    A token without probability is never taken. One number a token: the same text in any batch.
    """
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]


class Uniform:
    """Uniform numbers for the masks of a batch, from one generator a row and so apart from the rest of the batch.

    A row's k-th mask always gets the k-th number of a drawing: padding does not move it.
    """

    def __init__(self, generators: Sequence[torch.Generator], masks: torch.Tensor):
        self.generators, self.shape, self.device = generators, masks.shape, masks.device
        self.places = [row.nonzero()[:, 0] for row in masks.cpu()]

    def draw(self, active: torch.Tensor) -> torch.Tensor:
        """(B, L) float64 in [0, 1) at the masks of the rows in `active` (B,); zeros elsewhere."""
        numbers = torch.zeros(self.shape, dtype=torch.float64)
        for row in active.nonzero().flatten().tolist():
            generator, place = self.generators[row], self.places[row]
            drawn = torch.rand(len(place), dtype=torch.float64, generator=generator, device=generator.device)
            numbers[row, place] = drawn.cpu()
        return numbers.to(self.device)


def generators_of(generator: torch.Generator | Sequence[torch.Generator] | None, rows: int) -> list[torch.Generator]:
    """One generator a row: the given ones, or new ones with seeds from the one given or from torch's own.

    Raises ValueError for another number of generators than rows.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        if len(generator) != rows:
            raise ValueError(f"{len(generator)} generators for {rows} rows; expected one a row")
        return list(generator)
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**62, (rows,), generator=generator, device=device).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]
