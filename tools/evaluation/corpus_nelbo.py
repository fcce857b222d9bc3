"""The NELBO of packed rows by a masked diffusion model, and their exact NLL by an autoregressive one. Not a verb.

x0 clean tokens, t in (0, 1] the masking probability, L the tokens of a row. Eq. 7 of arXiv 2410.17891:
E_t E_xt (1/t) Σ 1[masked] (-log p(x0 | xt)) bounds -log p(x0) from above.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pretrain.data import permute
from pretrain.model.forms import Full
from pretrain.model.modeling_diffullama import IGNORE
from pretrain.model.reading import uses_shift
from pretrain.model.visibility import Visibility
from pretrain.objectives.masked_diffusion import BUCKETS, EPS, bucket_names, corrupt, sample_time
from pretrain.step import Rows

LIKELIHOODS = ("mask_count", "nelbo")


@dataclass(frozen=True)
class Place:
    """A row of a source: its number there, and that it is the i-th of `total` that are read."""

    source: str
    row: int
    i: int
    total: int


@dataclass(frozen=True)
class Noise:
    """How a diffusion model's rows are masked.

    mask_count: l ~ U{1 … M} of the row's M tokens, weight M / l, and t stands for l / M. Averaging Eq. 7 over
    t ~ U(0, 1) weighs each l alike, so the expectation is the same, and the number of losses is not random.
    nelbo: t ~ U(eps, 1), each token with probability t, weight 1/t, as in training.
    """

    likelihood: str
    draws: int  # of each row
    seed: int
    eps: float = EPS

    def draw(self, place: Place, draw: int, maskable: np.ndarray) -> tuple[float, np.ndarray]:
        """(t, masked (L,)) of one draw: a function of the seed, the source, the row and the draw.

        The draws of a row divide (0, 1] evenly, and so do the rows of a draw: each gets a stratum of its own. Which
        one is random, since neighbouring rows may be alike.
        """
        key = hashlib.sha256(f"{self.seed}\n{place.source}\n{place.row}\n{draw}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
        of_source = int.from_bytes(hashlib.sha256(place.source.encode()).digest()[:8], "little") >> 1
        stratum = permute(place.i, place.total, self.seed, of_source)
        u = ((stratum + generator.random()) / place.total + draw / self.draws) % 1.0
        numbers = generator.random(len(maskable))
        if self.likelihood == "nelbo":
            t = np.array(sample_time(u, self.eps))
            return float(t), corrupt(numbers, maskable, t, numbers, 0)[1]
        count = int(maskable.sum())
        if not count:
            return 1.0, maskable
        masked = 1 + int(u * count)
        return masked / count, maskable & (numbers <= np.sort(numbers[maskable])[masked - 1])


@dataclass
class RowScore:
    """Sums over the tokens of a row, in nats. Of an exact NLL the buckets are empty."""

    tokens: int  # that were counted: of a diffusion model those that can be masked
    nll: float  # their NELBO together, the mean of the draws; or their exact NLL
    bucket_nll: list[float]  # cross-entropy at masked tokens by bucket of t, all draws together
    bucket_masked: list[int]  # how many tokens that are


@torch.no_grad()
def diffusion_scores(model: Any, rows: Rows, places: Sequence[Place], noise: Noise, batch_size: int) -> list[RowScore]:
    """A score for each of `rows`, which stand at `places`; `batch_size` masked rows at a time.

    Tokens are counted as in training: with the shift, nothing predicts a row's or an isolated document's first token.
    """
    maskable = rows.real & ~rows.first if uses_shift(model.config) else rows.real
    buckets = len(BUCKETS)
    scores = [RowScore(int(tokens), 0.0, [0.0] * buckets, [0] * buckets) for tokens in maskable.sum(1)]
    drawn = [(r, *noise.draw(place, k, maskable[r])) for r, place in enumerate(places) for k in range(noise.draws)]
    for begin in range(0, len(drawn), batch_size):
        part = drawn[begin : begin + batch_size]
        index = [r for r, *_ in part]
        masked = np.stack([m for *_, m in part])  # (B, L)
        if not masked.any():
            continue
        x0 = rows.x0[index]
        arguments: dict[str, Any] = {
            "input_ids": np.where(masked, model.config.mask_token_id, x0),
            "labels": np.where(masked, x0, IGNORE),
        }
        if rows.documents is not None and rows.positions is not None:
            arguments["position_ids"] = rows.positions[index]
        arguments = {name: torch.from_numpy(array).to(model.device) for name, array in arguments.items()}
        if rows.documents is not None:
            documents = torch.from_numpy(rows.documents[index]).to(model.device)
            arguments["visibility"] = Visibility(Full(), documents)
        nll = model(**arguments).nll.double().cpu().numpy()  # (masked,) in row-major order
        ends = np.cumsum(masked.sum(1))
        for (r, t, _), row_nll in zip(part, np.split(nll, ends[:-1]), strict=True):
            bucket = int(np.searchsorted(BUCKETS[:-1], t))
            scores[r].nll += float(row_nll.sum()) / t / noise.draws
            scores[r].bucket_nll[bucket] += float(row_nll.sum())
            scores[r].bucket_masked[bucket] += len(row_nll)
    return scores


@torch.no_grad()
def exact_scores(model: Any, rows: Rows, batch_size: int) -> list[RowScore]:
    """The NLL of each row by transformers' causal language model: of every token but a first one.

    Isolated documents are read one by one, from position 0.
    """
    sequences = []  # (row, its tokens)
    for r, (x0, real) in enumerate(zip(rows.x0, rows.real)):
        documents = np.zeros(len(x0), dtype=np.int64) if rows.documents is None else rows.documents[r]
        sequences += [(r, x0[real & (documents == number)]) for number in np.unique(documents[real])]
    scores = [RowScore(0, 0.0, [], []) for _ in rows.x0]
    for begin in range(0, len(sequences), batch_size):
        part = sequences[begin : begin + batch_size]
        ids = torch.zeros(len(part), max(len(tokens) for _, tokens in part), dtype=torch.int64)
        for k, (_, tokens) in enumerate(part):
            ids[k, : len(tokens)] = torch.from_numpy(tokens)  # padding comes after, so causal attention ignores it
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits  # (B, L, V)
        for k, (r, tokens) in enumerate(part):
            predicted = slice(0, len(tokens) - 1)
            nll = F.cross_entropy(logits[k, predicted].float(), ids[k, 1 : len(tokens)], reduction="none")
            scores[r].nll += nll.double().sum().item()
            scores[r].tokens += len(tokens) - 1
    return scores


def ratio(values: np.ndarray, weights: np.ndarray) -> tuple[float, float | None]:
    """(Σ values / Σ weights, its standard error over rows), both arrays (rows,). One row has no standard error.

    By linearisation: the residuals values - ratio · weights are a sample of mean 0.
    """
    total = weights.sum()
    found = float(values.sum() / total)
    rows = len(values)
    if rows < 2:
        return found, None
    residuals = values - found * weights
    return found, float(math.sqrt(rows / (rows - 1) * (residuals**2).sum()) / total)


def summary(scores: Sequence[RowScore], text_bytes: float | None, exact: bool) -> dict[str, Any]:
    """What results.json says of a source; `text_bytes`: of the counted tokens' text, or None where it is not known.

    nelbo and ce_to_t… in nats, bits_per_token, bits_per_byte, perplexity_bound = exp(nelbo), each with `_stderr`.
    """
    tokens = np.array([score.tokens for score in scores], dtype=float)
    nelbo, stderr = ratio(np.array([score.nll for score in scores]), tokens)
    bound = math.exp(nelbo) if nelbo < 700 else None  # more is no number of a float
    scaled: dict[str, tuple[float | None, float | None]] = {
        "nelbo": (nelbo, stderr),
        "perplexity_bound": (bound, None if stderr is None or bound is None else bound * stderr),
        "bits_per_token": (nelbo / math.log(2), None if stderr is None else stderr / math.log(2)),
    }
    if text_bytes:
        factor = float(tokens.sum()) / text_bytes / math.log(2)
        scaled["bits_per_byte"] = (nelbo * factor, None if stderr is None else stderr * factor)
    if not exact:
        by_bucket = np.array([score.bucket_nll for score in scores]), np.array([s.bucket_masked for s in scores])
        for name, nll, masked in zip(bucket_names("ce"), by_bucket[0].T, by_bucket[1].T):
            if masked.any():
                scaled[name] = ratio(nll, masked.astype(float))
    found: dict[str, Any] = {"metric": "nelbo", "n": len(scores), "tokens": int(tokens.sum()), "stderr": stderr}
    for name, (value, spread) in scaled.items():
        found |= {name: value, f"{name}_stderr": spread}
    return found | ({"exact": True} if exact else {})
