"""Masked (absorbing) diffusion: the method of "Scaling Diffusion Language Models via Adaptation from Autoregressive
Models", arXiv 2410.17891. Its mathematics as pure functions, then the objective that uses them.

x0 clean tokens, xt corrupted tokens, t in (0, 1] the time and the masking probability. The shift (hidden state i
predicts token i + 1) stands in the model's forward, where training and sampling share it.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from ..annealing import annealed_form
from ..config import DiffusionConfig, RunConfig
from ..data import NOISE, VALIDATION, permute, stream
from ..model.forms import Causal, Form, Full
from ..model.modeling_diffullama import IGNORE
from ..step import Batch, HeldOut, Losses, Reported, Rows, at_labels, mean, one_forward

EPS = DiffusionConfig.eps  # smallest time: 1/t stays bounded
# Upper ends of the buckets of t that losses are reported in. Over all t they look flat, because t is random.
BUCKETS = (0.25, 0.5, 0.75, 1.0)
STRATA = 1 << 60  # the permutations of strata begin here, far from those of epochs


def sample_time(u: Any, eps: float = EPS) -> Any:
    """t ~ U(eps, 1) from u ~ U(0, 1), of u's shape (Algorithm 1)."""
    return eps + (1 - eps) * u


def corrupt(x0: Any, maskable: Any, t: Any, u: Any, mask_token_id: int) -> tuple[Any, Any]:
    """xt ~ q(xt | x0): each maskable token becomes the mask with probability t, independently.

    `x0`, `maskable` and `u` ~ U(0, 1) have shape (..., L), `t` (...), as numpy arrays or tensors. Returns
    (xt, masked), both (..., L). The noise says what is masked, never a comparison of ids with `mask_token_id`,
    which may occur in the data.
    """
    where: Any = np.where if isinstance(x0, np.ndarray) else torch.where
    masked = (u < t[..., None]) & maskable
    return where(masked, mask_token_id, x0), masked


def bucket_sums(nll: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """(2 · buckets,) float64: the sum of `nll` (masked,) by bucket of `t` (masked,), then the number of positions."""
    sums = torch.zeros(2, len(BUCKETS), dtype=torch.float64, device=nll.device)
    bucket = torch.bucketize(t, torch.tensor(BUCKETS[:-1], device=nll.device))
    sums[0].index_add_(0, bucket, nll.double())
    sums[1].index_add_(0, bucket, torch.ones_like(nll, dtype=torch.float64))
    return sums.flatten()


def bucket_means(sums: torch.Tensor, name: str) -> dict[str, float]:
    """`name`_to_t0.25 … `name`_to_t1: cross-entropy in nats by bucket; without the empty ones."""
    totals, counts = sums.view(2, -1).tolist()
    return {key: nll / n for key, nll, n in zip(bucket_names(name), totals, counts) if n}


def bucket_names(name: str) -> tuple[str, ...]:
    """The metrics that `bucket_means` gives."""
    return tuple(f"{name}_to_t{edge:g}" for edge in BUCKETS)


class MaskedDiffusion:
    """Loss (Eq. 7): (1/t) · cross-entropy at masked positions, over the global batch.

    Divided by the number of maskable tokens it is the NELBO in nats a token; by the number of masked tokens, the
    authors' objective.
    """

    reported: ClassVar[Reported] = Reported(
        training="masked_ce",
        compared=bucket_names("masked_ce"),
        held_out="val_masked_ce",
        base="causal_masked_ce",
    )
    masks: ClassVar[bool] = True
    losses = staticmethod(one_forward)

    def __init__(self, config: RunConfig, mask_token_id: int):
        self.settings = config.diffusion
        self.annealing = config.annealing
        self.times = config.validation.times
        self.seed = config.train.seed
        self.global_batch = config.train.global_batch_size
        self.mask_token_id = mask_token_id
        self.pairs = config.diffusion.time_sampling == "complementary"
        self.repeats = 2 if self.pairs else 1

    @staticmethod
    def forms(config: RunConfig) -> list[Form]:
        """The annealed form where there is one, and what it ends in."""
        annealed, _ = annealed_form(config.annealing, 0, 64, config.train.seed)
        return [Full()] if isinstance(annealed, Full) else [annealed, Full()]

    def batch(self, rows: Rows, step: int | None, time: float | None = None) -> Batch:
        """Rows of a global batch with the noise of (seed, row number), under the annealed attention of `step`.

        `step` None: held-out rows, read bidirectionally, on noise that never changes; `time` then fixes t.
        """
        length = rows.x0.shape[1]
        if step is None:
            form = Full()
            notes = {}
            noise = [stream(0, i, VALIDATION) for i in rows.numbers]
            # row i of N gets a time in the i-th of N equal parts of (0, 1], so that few rows cover all times
            t = np.array([
                sample_time((i + generator.random()) / total, self.settings.eps) if time is None else time
                for i, total, generator in zip(rows.numbers, rows.totals, noise)
            ])  # fmt: skip
        else:
            form, progress = annealed_form(self.annealing, step, length, self.seed)
            notes = {"anneal_ratio": progress, **form.metrics()}
            noise = [stream(self.seed, n // self.repeats, NOISE) for n in rows.numbers]
            t = np.array([self._time(n, generator.random()) for n, generator in zip(rows.numbers, noise)])
        u = np.stack([generator.random(length) for generator in noise])
        # the shift leaves nothing that predicts a row's, or an isolated document's, first token
        maskable = rows.real & ~rows.first if self.settings.shift else rows.real
        xt, masked = corrupt(rows.x0, maskable, t, u, self.mask_token_id)
        if self.pairs and step is not None:  # in every second row, mask what the same noise left in the first, at 1 - t
            second = np.array(rows.numbers) % 2 == 1
            masked = np.where(second[:, None], maskable & ~masked, masked)
            xt = np.where(masked, self.mask_token_id, rows.x0)
            t = np.where(second, 1 - t, t)
        counts = {"labelled": int(masked.sum()), "maskable": int(maskable.sum())}
        times = torch.from_numpy(t.astype(np.float32))
        weights = 1 / (times * max(self._denominator(counts), 1))  # Eq. 7
        tensors = {
            "input_ids": torch.from_numpy(xt),
            "labels": torch.from_numpy(np.where(masked, rows.x0, IGNORE)),
            "loss_weights": weights[:, None].expand(xt.shape),
            "t": times,
        }
        if rows.documents is not None:
            tensors["documents"] = torch.from_numpy(rows.documents)
            tensors["position_ids"] = torch.from_numpy(rows.positions)
        return Batch(tensors, form, counts, notes)

    def _time(self, n: int, u: float) -> float:
        """The time of training row n, from a uniform number of its own."""
        eps = self.settings.eps
        if self.pairs:
            return eps + (1 - 2 * eps) * u  # so that 1 - t is a time too
        if self.settings.time_sampling == "stratified":  # one row in each of as many equal parts as the batch has rows
            step, i = divmod(n, self.global_batch)
            u = (permute(i, self.global_batch, self.seed, STRATA + step) + u) / self.global_batch
        return sample_time(u, eps)

    def _denominator(self, counts: dict[str, int]) -> int:
        return counts["labelled" if self.settings.normalize_by == "masked" else "maskable"]

    def sums(self, batch: Batch, losses: Losses) -> torch.Tensor:
        """nll / t, nll; in evaluation hits and predictions of the mask itself; nll and positions by bucket of t."""
        nll = losses.nll.double()
        labels = batch.tensors["labels"]
        t = at_labels(batch.tensors["t"], labels)
        found = [(nll / t).sum(), nll.sum(), nll.new_zeros(()), nll.new_zeros(())]
        if losses.predicted is not None:
            found[2] = (losses.predicted == labels[labels != IGNORE]).sum().double()
            found[3] = (losses.predicted == self.mask_token_id).sum().double()
        return torch.cat([torch.stack(found), bucket_sums(nll, t)])

    def metrics(self, counts: dict[str, int], sums: torch.Tensor) -> dict[str, float]:
        """`loss` (Eq. 7), `masked_ce` in nats a masked token, also by bucket of t."""
        weighted, nll = sums[:2].tolist()
        return {
            "loss": weighted / max(self._denominator(counts), 1),
            "masked_ce": nll / max(counts["labelled"], 1),
            **bucket_means(sums[4:], "masked_ce"),
        }

    def held_out(self, rows: Rows, base: bool) -> Iterator[HeldOut]:
        """What the model loses reading bidirectionally, whatever the annealing, on noise that never changes.

        `val_nelbo` (nats a maskable token), `val_masked_ce` (nats a masked token), by bucket of t
        (`val_masked_ce_to_t…`) and at each of validation.times (`val_masked_ce_t…`), `val_accuracy` (share of masked
        tokens that the most likely prediction hits) and `val_mask_share` (share of predictions that are the mask
        token itself). With `base`: `causal_masked_ce`, what the AR base loses on the same rows and noise when it
        reads causally, as it was trained.
        """
        batch = self.batch(rows, None)
        yield HeldOut(batch, lambda sums: self._judged(batch.counts, sums))
        for time in self.times:
            fixed = self.batch(rows, None, time)
            name = f"val_masked_ce_t{time:g}"
            masked = fixed.counts["labelled"]
            yield HeldOut(fixed, lambda sums, name=name, masked=masked: {name: mean(sums[1].item(), masked)})
        if base and self.settings.shift:  # without the shift, nothing that the base learnt is read as it was trained
            yield HeldOut(
                replace(batch, form=Causal()),
                lambda sums: {
                    "causal_masked_ce": mean(sums[1].item(), batch.counts["labelled"]),
                    **bucket_means(sums[4:], "causal_masked_ce"),
                },
            )

    def _judged(self, counts: dict[str, int], sums: torch.Tensor) -> dict[str, float]:
        weighted, nll, hits, masks = sums[:4].tolist()
        masked = counts["labelled"]
        return {
            "val_nelbo": mean(weighted, counts["maskable"]),
            "val_masked_ce": mean(nll, masked),
            **bucket_means(sums[4:], "val_masked_ce"),
            "val_accuracy": mean(hits, masked),
            "val_mask_share": mean(masks, masked),
        }

    def shipped(self, tokenizer: dict) -> dict[str, Any]:
        """`diffusion` and the mask's id: what the shipped model and its sampler obey."""
        special = tokenizer["special_ids"]
        before = special["bos"] if tokenizer["add_bos"] else tokenizer.get("separator")  # what stands before a document
        return {
            "mask_token_id": self.mask_token_id,
            "diffusion": {
                "shift": self.settings.shift,
                "eps": self.settings.eps,
                "normalize_by": self.settings.normalize_by,
                "start_token_id": special["eos"] if before is None else before,
            },
        }
