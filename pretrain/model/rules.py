"""Which masks a decoding step turns into tokens: pure functions of what the model proposes for them.

Each takes (B, L) tensors and returns (B, L) bool, True where the proposed token is committed. Rows are apart from each
other: what one row commits never depends on the rest of its batch. `candidates` are the masks that may be committed
now. A rule that may find nothing good enough is joined with `best(..., 1)` by the caller, so that a step always does.

    c_j  probability of the token proposed for position j     H_j  entropy of the prediction for j, in nats
"""

from dataclasses import dataclass

import torch

ORDERS = ("random", "confidence", "margin", "entropy", "left_to_right")
BLIND = ("random", "left_to_right")  # orders that choose without asking the model


@dataclass
class Proposals:
    """What the model says of the candidates, all (B, L); other positions hold anything.

    `confidence`, `margin` (best less second best) and `entropy` are of the model's own prediction, before
    temperature and filters, without the mask token: a rule means the same however tokens are drawn.
    """

    token: torch.Tensor
    confidence: torch.Tensor
    margin: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    calm: torch.Tensor | None = None  # int: for how many steps the prediction has hardly changed


def score(order: str, proposals: Proposals) -> torch.Tensor:
    """(B, L): the higher, the earlier `order` commits a position. Not for the BLIND orders."""
    if order == "confidence":
        return proposals.confidence
    found = proposals.margin if order == "margin" else proposals.entropy
    if found is None:
        raise ValueError(f"the proposals hold no {order}")
    return found if order == "margin" else -found


def leftmost_first(candidates: torch.Tensor) -> torch.Tensor:
    """(B, L): scores that fall from left to right."""
    return -torch.arange(candidates.shape[1], device=candidates.device).expand(candidates.shape).double()


def ranks(scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """(B, L): the place of each candidate in its row, 0 for the highest score; among equal scores the left one first.

    Positions that are no candidates come after all that are.
    """
    scores = scores.double().masked_fill(~candidates, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def best(scores: torch.Tensor, candidates: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """The `count` candidates, (B, 1) or one number, with the highest scores in each row."""
    return candidates & (ranks(scores, candidates) < count)


def independently(uniform: torch.Tensor, candidates: torch.Tensor, steps_left: torch.Tensor) -> torch.Tensor:
    """Each candidate with probability 1 / `steps_left` (B, 1): arXiv 2410.17891, Algorithm 2, at step k = steps_left.

    `uniform` (B, L) in [0, 1) are independent.
    """
    return candidates & (uniform * steps_left < 1)


def above_threshold(proposals: Proposals, candidates: torch.Tensor, threshold: float) -> torch.Tensor:
    """Those with c > threshold. Fast-dLLM, arXiv 2505.22618, confidence-aware parallel decoding."""
    return candidates & (proposals.confidence > threshold)


def by_factor(proposals: Proposals, candidates: torch.Tensor, factor: float) -> torch.Tensor:
    """The n most confident, for the largest n with (n + 1)(1 − c of the n-th) < factor. Fast-dLLM, theorem 1."""
    n = ranks(proposals.confidence, candidates) + 1
    return candidates & ((n + 1) * (1 - proposals.confidence.double()) < factor)  # it rises with n: these are a prefix


def within_entropy_bound(proposals: Proposals, candidates: torch.Tensor, bound: float) -> torch.Tensor:
    """By rising entropy, the longest prefix whose sum of H less its largest is at most `bound`. arXiv 2505.24857.

    The sum less the largest bounds what is lost by taking the tokens as independent.
    """
    if proposals.entropy is None:
        raise ValueError("the proposals hold no entropy")
    entropy = proposals.entropy.double()
    order = entropy.masked_fill(~candidates, torch.inf).argsort(dim=1, stable=True)
    rising = entropy.masked_fill(~candidates, 0).gather(1, order)
    before = rising.cumsum(dim=1) - rising  # rising, so the largest of a prefix is its last
    fits = torch.zeros_like(candidates).scatter(1, order, before <= bound)
    return candidates & fits


def calm_and_confident(proposals: Proposals, candidates: torch.Tensor, threshold: float) -> torch.Tensor:
    """KLASS, arXiv 2511.05664: those with c > threshold whose prediction has hardly changed for two steps."""
    if proposals.calm is None:
        raise ValueError("the proposals do not say how calm they are")
    return above_threshold(proposals, candidates, threshold) & (proposals.calm >= 2)


def doubtful(
    verified: torch.Tensor, drafted: torch.Tensor, threshold: float, drafted_before: torch.Tensor
) -> torch.Tensor:
    """WINO, arXiv 2507.18578: the tokens among `drafted` that become masks again, where `verified` < threshold.

    `verified` is their probability with themselves hidden. Fewer than `drafted_before` (B, 1), the tokens that the
    step before committed, so that t steps find at least t tokens: the least likely first.
    """
    bad = drafted & (verified < threshold)
    return best(-verified, bad, drafted_before - 1)


def forgotten(
    uniform: torch.Tensor, confidence: torch.Tensor, committed: torch.Tensor, remasking: float
) -> torch.Tensor:
    """Each committed token with probability remasking · (1 − c), c its confidence when it was committed.

    The remasking of ReMDM, arXiv 2503.00307, weighted by confidence; certain tokens stay.
    """
    return committed & (uniform < remasking * (1 - confidence))
