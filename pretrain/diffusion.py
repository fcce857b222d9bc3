"""The method's mathematics, as pure functions on tensors or numpy arrays.

x0 clean tokens, xt corrupted tokens, t in (0, 1] the time and the masking probability. Equations are
those of "Scaling Diffusion Language Models via Adaptation from Autoregressive Models", arXiv 2410.17891.
The shift (hidden state i predicts token i + 1) stands in the model's forward, where training and
sampling share it.
"""

import math

import numpy as np
import torch

EPS = 1e-3  # smallest time: 1/t stays bounded
# Upper ends of the buckets of t that losses are reported in: over all t they look flat, because t is random.
BUCKETS = (0.25, 0.5, 0.75, 1.0)


def sample_time(u, eps: float = EPS):
    """t ~ U(eps, 1) from u ~ U(0, 1), of u's shape (Algorithm 1)."""
    return eps + (1 - eps) * u


def corrupt(x0, maskable, t, u, mask_token_id: int):
    """xt ~ q(xt | x0): each maskable token becomes the mask with probability t, independently.

    `x0`, `maskable` and `u` ~ U(0, 1) have shape (..., L), `t` (...) . Returns (xt, masked), both
    (..., L). What is masked is known by the noise, never by comparing ids with `mask_token_id`, which
    may occur in the data.
    """
    where = np.where if isinstance(x0, np.ndarray) else torch.where
    masked = (u < t[..., None]) & maskable
    return where(masked, mask_token_id, x0), masked


def maskable_positions(document_lengths: np.ndarray, isolated: bool) -> np.ndarray:
    """(L,) bool: every position but a row's first, and each document's first when documents are isolated.

    Nothing predicts those: hidden state i predicts token i + 1 from its own row or document.
    """
    maskable = np.ones(int(document_lengths.sum()), dtype=bool)
    maskable[0] = False
    if isolated:
        maskable[(np.cumsum(document_lengths) - document_lengths).astype(np.int64)] = False
    return maskable


def loss_weights(t: torch.Tensor, denominator: float) -> torch.Tensor:
    """Eq. 7: the loss is the sum of these weights, (1/t) / `denominator`, times -log p(x0 | xt) at masked positions.

    `t` (masked,): the time of each masked position. With the number of maskable tokens as denominator the
    loss is the NELBO a token in nats; with the number of masked tokens, the authors' objective. Take
    the denominator of the whole global batch, so that the gradient does not depend on how it is split.
    """
    return 1 / (t * max(denominator, 1))


def bucket_sums(nll: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """(2, buckets) float64: the sum of `nll` (masked,) and the number of positions, by the bucket of `t` (masked,)."""
    sums = torch.zeros(2, len(BUCKETS), dtype=torch.float64, device=nll.device)
    bucket = torch.bucketize(t, torch.tensor(BUCKETS[:-1], device=nll.device))
    sums[0].index_add_(0, bucket, nll.double())
    sums[1].index_add_(0, bucket, torch.ones_like(nll, dtype=torch.float64))
    return sums


def bucket_means(sums: torch.Tensor, name: str) -> dict[str, float]:
    """`name`_to_t0.25 … `name`_to_t1: cross-entropy in nats by bucket; without the empty ones."""
    (totals, counts) = sums.tolist()
    return {f"{name}_to_t{edge:g}": nll / n for edge, nll, n in zip(BUCKETS, totals, counts) if n}


def annealing_progress(step: int, steps: int, schedule: str = "linear", stages: int = 8) -> float:
    """How far attention is from causal (0) to bidirectional (1) at a step, from 0; 1 where steps is 0.

    `linear`: min(1, (step + 1) / steps), the paper's. `cosine`: slow at both ends. `stepwise`: linear, rounded
    up to multiples of 1/`stages`, so that there are few distinct masks.
    """
    if steps <= 0:
        return 1.0
    linear = min(1.0, (step + 1) / steps)
    if schedule == "cosine":
        return (1 - math.cos(math.pi * linear)) / 2
    return math.ceil(linear * stages) / stages if schedule == "stepwise" else linear


def annealed_width(form: str, progress: float, length: int) -> int:
    """Positions that `window` and `block` show at `progress` in rows of `length`.

    A window's right context grows in proportion, from 0 to length - 1. A block grows by powers of two from 1
    to length, as block-diffusion schedules do: each doubling takes the same number of steps.
    """
    if form == "window":
        return round(progress * (length - 1))
    return length if progress >= 1 else min(length, 2 ** round(progress * math.log2(length)))
