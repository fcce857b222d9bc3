"""From masks to text in steps: each asks the model once and commits some of the tokens that it proposes.

In: ids with mask tokens where text is wanted, at the end, in gaps, or everywhere after the first token. Out: ids with
none; given tokens stay. `states` is the loop, a generator of what stands after each step; which masks a step commits
is chosen by the pure functions of rules.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .drawing import GREEDY_BELOW, Uniform, generators_of, invert, warpers
from .reading import Reader, uses_shift, window_of
from .rules import (
    Proposals,
    above_threshold,
    best,
    by_factor,
    calm_and_confident,
    doubtful,
    forgotten,
    independently,
    leftmost_first,
    score,
    within_entropy_bound,
)
from .settings import SamplingSettings


@dataclass
class State:
    """What stands after a step; all (B, L) but `nfe`."""

    ids: torch.Tensor  # with mask tokens where text is still missing
    masked: torch.Tensor  # bool: where it is
    committed: torch.Tensor  # bool: found in this step
    revised: torch.Tensor  # bool: became masks again in this step
    draft: torch.Tensor  # ids, and for masks the token that the model proposed where it was asked
    confidence: torch.Tensor  # the model's probability of each found token when it was committed; NaN: none found
    nfe: torch.Tensor  # (B,): model calls so far


def allotted(sizes: torch.Tensor, steps: int | None) -> torch.Tensor:
    """(B, K) steps of blocks with `sizes` (B, K) masks: `steps` shared in proportion, at least one each."""
    total = sizes.sum(dim=1, keepdim=True)
    ends = sizes.cumsum(dim=1) * (total if steps is None else min(steps, 2**31)) // total.clamp(min=1)
    return ends.diff(dim=1, prepend=ends.new_zeros(len(ends), 1)).clamp(min=1)


class Memory:
    """KLASS: for how many steps each prediction has moved by less than a bound, in KL(p_t ‖ p_{t−1})."""

    def __init__(self, shape: torch.Size, bound: float, device: torch.device):
        self.bound = bound
        self.calm = torch.zeros(shape, dtype=torch.long, device=device)
        self.before: torch.Tensor | None = None  # (N, V) log probabilities of the step before
        self.place = torch.full(shape, -1, device=device)  # (B, L): the row of `before` that is a position's

    def see(self, logits: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """(B, L): how calm the predictions are with these of the positions `at`."""
        now = logits.log_softmax(-1)
        calm = torch.zeros_like(self.calm)
        place = self.place[at]
        if self.before is not None:
            moved = now.exp() * (now - self.before[place.clamp(min=0)])
            still = (place >= 0) & (moved.nan_to_num(nan=0.0).sum(-1) < self.bound)  # NaN: 0 · (−∞ + ∞)
            calm[at] = torch.where(still, self.calm[at] + 1, 0)
        self.before, self.calm = now, calm
        self.place = torch.full_like(self.place, -1).masked_scatter_(at, torch.arange(len(now), device=at.device))
        return calm


def states(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    mask_token_id: int | None = None,
    settings: SamplingSettings | None = None,
) -> Iterator[State]:
    """Fill the mask tokens of `input_ids` (B, L) step by step; yields the state after each.

    `attention_mask` (B, L) is 0 at padding, before or after a row. `generator`: one for each row, or one that seeds
    them; a row's text depends on its own generator and tokens alone. After an `eos_token_id` that has come to stay in
    a gap at a row's end, what follows it there is the same token, without asking the model.
    Raises ValueError, with the shift, for a mask token at the first position of a row, which nothing predicts.
    """
    mask: int = model.config.mask_token_id if mask_token_id is None else mask_token_id
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    masked = (input_ids == mask) & real
    if not masked.any():
        return
    _check(masked, real, uses_shift(model.config))
    generators = generators_of(generator, len(input_ids))
    ends = torch.as_tensor([] if eos_token_id is None else eos_token_id, dtype=torch.long, device=real.device).flatten()
    decoding = _Decoding(model, input_ids, real, generators, ends, mask, settings or SamplingSettings())
    while decoding.masked.any():
        yield decoding.step()


class _Decoding:
    """What `states` keeps from step to step, and one step. Tensors are (B, L) or, where one number a row, (B,)."""

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        real: torch.Tensor,
        generators: Sequence[torch.Generator],
        ends: torch.Tensor,
        mask_token_id: int,
        settings: SamplingSettings,
    ):
        self.settings, self.mask_token_id, self.real = settings, mask_token_id, real
        self.shift = uses_shift(model.config)
        self.ids, self.masked = input_ids, (input_ids == mask_token_id) & real
        self.random = Uniform(generators, self.masked)
        self.process: Any = warpers(
            settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.repetition_penalty
        )
        self.ends = ends
        self.trailing = self.masked & ((real & ~self.masked).flip(1).cumsum(1).flip(1) == 0)
        self.block = blocks_of(self.masked, settings.block_length)  # -1 at given tokens
        self.blocks = int(self.block.max()) + 1
        self.sizes = torch.zeros(len(real), self.blocks, dtype=torch.long, device=real.device)
        self.sizes.scatter_add_(1, self.block.clamp(min=0), self.masked.long())  # (B, K)
        self.budget = allotted(self.sizes, settings.steps)  # (B, K)
        self.confidence = torch.full(real.shape, torch.nan, device=real.device)
        self.nfe = torch.zeros(len(real), dtype=torch.long, device=real.device)
        self.current = torch.full_like(self.nfe, -1)  # the block that a row fills
        self.left = torch.zeros_like(self.nfe)  # steps that it has for it
        self.committed_before = torch.zeros_like(self.nfe)
        width = self._widest_window() if settings.compile else None
        self.reader = Reader(model, real, settings.cache is not None, settings.refresh_every, width)
        self.memory = None if settings.kl_threshold is None else Memory(real.shape, settings.kl_threshold, real.device)

    @torch.no_grad()
    def step(self) -> State:
        """Ask the model once, commit some of what it proposes, and perhaps take some of it back."""
        self._begin_blocks()
        unfinished = self.masked.any(dim=1)
        here = self.block == self.current[:, None]
        candidates = self.masked & here
        old = here & ~self.masked & ((self.left > 1) & unfinished)[:, None]  # may become masks again: not at the end
        count = -(-candidates.sum(dim=1) // self.left.clamp(min=1))  # (B,), rounded up: what is left is shared
        blind = self.settings.blind
        chosen = self._blindly(candidates, count) if blind else torch.zeros_like(self.masked)
        beyond = self.memory is not None and self.settings.cache is None  # KLASS remembers what comes next, too
        at = chosen if blind else self.masked if beyond else candidates
        revised = torch.zeros_like(self.masked)
        draft = self.ids
        if at.any():
            if self.settings.verify_threshold is not None and old.any():
                logits, revised = self._ask_and_verify(at, old)
            else:
                logits = self.reader.logits(self.ids, at, here, self.current)
            self.nfe = self.nfe + at.any(dim=1)
            logits, probability = self._predictions(logits)
            proposals = self._judge(probability, at, logits)
            drawn = at
            if self.settings.draws_last:  # what is not committed needs no token
                drawn = chosen = chosen if blind else self._by_proposals(proposals, candidates, count)
            self._draw(proposals, logits[drawn[at]], probability[drawn[at]], drawn)
            if not self.settings.draws_last:
                chosen = self._by_proposals(proposals, candidates, count)
            draft = torch.where(at, proposals.token, self.ids)
            self.ids = torch.where(chosen, proposals.token, self.ids)
            self.confidence = torch.where(chosen, proposals.confidence, self.confidence)
        if self.settings.remasking:
            uniform = self.random.draw(unfinished)
            revised = forgotten(uniform, self.confidence.nan_to_num(), old, self.settings.remasking)
        self.ids = self.ids.masked_fill(revised, self.mask_token_id)
        self.masked = self.masked & ~chosen | revised
        self.confidence = self.confidence.masked_fill(revised, torch.nan)
        self._cut()
        self.left, self.committed_before = (self.left - 1).clamp(min=1), chosen.sum(dim=1)
        draft = torch.where(self.masked, draft, self.ids)
        return State(self.ids, self.masked, chosen, revised, draft, self.confidence, self.nfe)

    def _widest_window(self) -> int:
        """Positions in the widest window of any block, for inputs of one shape."""
        found = [self.block[row : row + 1] == k for row in range(len(self.block)) for k in range(self.blocks)]
        return max(window_of(block, self.shift)[0].shape[1] for block in found if block.any())

    def _begin_blocks(self) -> None:
        """Turn each row to its first block with masks."""
        first = self.block.masked_fill(~self.masked, self.blocks).amin(dim=1)
        new = self.masked.any(dim=1) & (first != self.current)
        self.current = torch.where(new, first, self.current)
        self.left = torch.where(new, self._of_block(self.budget), self.left)

    def _of_block(self, numbers: torch.Tensor) -> torch.Tensor:
        """(B,): of `numbers` (B, K), that of the block which a row fills."""
        return numbers.gather(1, self.current.clamp(min=0)[:, None])[:, 0]

    def _blindly(self, candidates: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """(B, L): what an order that asks nothing commits.

        Random is Algorithm 2. Where a block has as many steps as masks, or more, it is one mask a step, uniformly
        chosen: what the algorithm comes to for ever more steps, exact, and without its empty steps.
        """
        if self.settings.by == "left_to_right":
            return best(leftmost_first(candidates), candidates, count[:, None])
        uniform = self.random.draw(self.masked.any(dim=1))
        singly = self._of_block(self.budget) >= self._of_block(self.sizes)
        evenly = best(uniform, candidates, count[:, None])
        return torch.where(singly[:, None], evenly, independently(uniform, candidates, self.left[:, None]))

    def _by_proposals(self, proposals: Proposals, candidates: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """(B, L): the `count` (B,) best of the order, and all that the adaptive rule takes."""
        settings = self.settings
        if settings.by == "random":
            scores = self.random.draw(self.masked.any(dim=1))
        elif settings.by == "left_to_right":
            scores = leftmost_first(candidates)
        else:
            scores = score(settings.by, proposals)
        chosen = best(scores, candidates, count[:, None])
        if settings.kl_threshold is not None and settings.threshold is not None:
            return chosen | calm_and_confident(proposals, candidates, settings.threshold)
        if settings.threshold is not None:
            return chosen | above_threshold(proposals, candidates, settings.threshold)
        if settings.factor is not None:
            return chosen | by_factor(proposals, candidates, settings.factor)
        if settings.entropy_bound is not None:
            return chosen | within_entropy_bound(proposals, candidates, settings.entropy_bound)
        return chosen

    def _ask_and_verify(self, at: torch.Tensor, drafted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, V) logits of `at`, and (B, L) what of `drafted` becomes masks again."""
        logits, checks = self.reader.logits_and_checks(self.ids, at, drafted)
        _, probability = self._predictions(checks)
        verified = spread(probability.gather(1, self.ids[drafted][:, None])[:, 0], drafted)
        assert self.settings.verify_threshold is not None, "nothing is to be verified"
        return logits, doubtful(verified, drafted, self.settings.verify_threshold, self.committed_before[:, None])

    def _predictions(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, V) fp32 logits and probabilities without the mask token. Raises ValueError where they are not finite."""
        logits = logits.float()
        logits[:, self.mask_token_id] = -torch.inf  # a mask is not text
        probability = logits.softmax(-1)
        if probability[:, 0].isnan().any():
            raise ValueError("the model's predictions are not finite (NaN or infinite logits)")
        return logits, probability

    def _judge(self, probability: torch.Tensor, at: torch.Tensor, logits: torch.Tensor) -> Proposals:
        """What the rule asks about the predictions (N, V) for the positions in `at` (B, L), before tokens are drawn."""
        proposals = Proposals(spread(probability.argmax(-1), at), torch.zeros(at.shape, device=at.device))
        if self.settings.by == "margin":
            top = probability.topk(2, dim=-1).values
            proposals.margin = spread(top[:, 0] - top[:, 1], at)
        if self.settings.by == "entropy" or self.settings.entropy_bound is not None:
            proposals.entropy = spread(torch.special.entr(probability).sum(-1), at)
        if self.memory is not None:
            proposals.calm = self.memory.see(logits, at)
        return proposals

    def _draw(self, proposals: Proposals, logits: torch.Tensor, probability: torch.Tensor, at: torch.Tensor) -> None:
        """Put a token and its confidence into the proposals for each of the N positions in `at` (B, L)."""
        if len(self.process):
            unseen = logits.shape[1]  # beyond the vocabulary: padding; and masks have no probability anyway
            known = self.ids.masked_fill(~self.real, unseen)[at.nonzero()[:, 0]]
            logits = self.process(known, logits.clone())
        if self.settings.temperature < GREEDY_BELOW:
            token = logits.argmax(-1)
        else:
            token = invert(logits, self.random.draw(at.any(dim=1))[at])
        proposals.token = torch.where(at, spread(token, at), proposals.token)
        proposals.confidence = spread(probability.gather(1, token[:, None])[:, 0], at)

    def _cut(self) -> None:
        """Let an end-of-text token that has come to stay, in a gap at a row's end, stand for all that follows it."""
        if not len(self.ends):
            return
        final = self.trailing & ~self.masked
        if self.settings.revises:
            unfinished = self.block.masked_fill(~self.masked, self.blocks).amin(dim=1, keepdim=True)
            final &= self.block < unfinished
        end = final & torch.isin(self.ids, self.ends)
        has, place = end.any(dim=1, keepdim=True), end.long().argmax(dim=1, keepdim=True)
        after = self.trailing & has & (torch.arange(self.ids.shape[1], device=self.ids.device) > place)
        self.ids, self.masked = torch.where(after, self.ids.gather(1, place), self.ids), self.masked & ~after
        self.confidence = self.confidence.masked_fill(after, torch.nan)


def spread(values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """(B, L) with the N `values` at the N positions in `at` (B, L), in row-major order; zeros elsewhere."""
    return torch.zeros(at.shape, dtype=values.dtype, device=values.device).masked_scatter_(at, values)


def blocks_of(masked: torch.Tensor, length: int | None) -> torch.Tensor:
    """(B, L) int64: the number of each mask's block of `length` masks, from 0, in one block without; -1 elsewhere."""
    place = masked.cumsum(dim=1) - 1
    return (place // length if length else torch.zeros_like(place)).masked_fill(~masked, -1)


def _check(masked: torch.Tensor, real: torch.Tensor, shift: bool) -> None:
    """Raise ValueError for masks that nothing predicts."""
    if not shift:
        return
    leading = real & (real.cumsum(dim=1) == 1)
    rows = (leading & masked).any(dim=1).nonzero().flatten().tolist()
    if rows:
        where = "the first token" if len(masked) == 1 else f"the first token of row {rows[0]}"
        raise ValueError(f"{where} is a mask, and nothing predicts it; put the start token in front")
