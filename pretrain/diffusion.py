"""The method's mathematics, as pure functions on tensors or numpy arrays.

x0 clean tokens, xt corrupted tokens, t in (0, 1] the time and the masking probability. Equations are
those of "Scaling Diffusion Language Models via Adaptation from Autoregressive Models", arXiv 2410.17891.
The shift (hidden state i predicts token i + 1) stands in the model's forward, where training and
sampling share it.
"""

import numpy as np
import torch

EPS = 1e-3  # smallest time: 1/t stays bounded


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


def weighted_loss(nll: torch.Tensor, t: torch.Tensor, denominator: float) -> torch.Tensor:
    """Eq. 7: the sum of (1/t) (-log p(x0 | xt)) over masked positions, over `denominator`.

    `nll` and `t` (masked,): the loss and the time of each masked position. With the number of maskable
    tokens as denominator this is the NELBO a token in nats; with the number of masked tokens, the
    authors' objective. Take the denominator of the whole global batch, so that the gradient does not
    depend on how the batch is split.
    """
    return (nll / t).sum() / max(denominator, 1)


def annealing_ratio(step: int, steps: int) -> float:
    """Share of future positions visible at a step, from 0: min(1, (step + 1) / steps); 1 where steps is 0."""
    return 1.0 if steps <= 0 else min(1.0, (step + 1) / steps)
