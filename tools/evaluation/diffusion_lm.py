"""Masked diffusion models, as lm-eval asks them.

A likelihood is estimated with the target masked and the context given; a text is decoded from masks, in a gap with
both sides given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from common.errors import UserError
from pretrain.model.generation import start_token
from pretrain.model.reading import uses_shift
from pretrain.model.settings import SamplingSettings

from ..decoding import continuation as tokens_of
from ..decoding import encode_parts, padded_left
from .answers import Answers
from .harness import GENERATED, Asked, Evaluated, cut, encode_pair, seed_of, text_of
from .likelihood import Score, draw, estimate, random_for

PAPER_STEPS = 32  # the authors' T


@dataclass(frozen=True)
class Likelihood:
    """How a diffusion model's likelihoods are estimated."""

    name: str
    draws: int
    seed: int = 0


@dataclass
class Row:
    """One reading of a sequence: which of its tokens are masked, and whose draw it is."""

    ids: list[int]
    masked: np.ndarray  # (tokens,) bool
    owner: tuple[int, int]  # request, draw


class DiffusionLM(Evaluated):
    """A masked diffusion model with `diffusion_generate`, as lm-eval's TemplateLM."""

    kind = "masked_diffusion"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        answers: Answers,
        likelihood: Likelihood,
        settings: SamplingSettings,
        batch_size: int = 32,
        progress: bool = True,
    ):
        super().__init__(answers, batch_size, model.device, progress)
        self.model, self.tokenizer, self.likelihood, self.settings = model, tokenizer, likelihood, settings
        self.mask_token_id: int = model.config.mask_token_id
        self.max_length: int = getattr(model.config, "max_position_embeddings", None) or 2048
        self.paper_temperature = 0.9 if model.config.model_type == "llama" else 0.95

    @property
    def eot_token_id(self) -> int:
        token = self.tokenizer.eos_token_id
        return self.prefix_token_id if token is None else token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context. Raises UserError where the model names no such token."""
        try:
            return start_token(self.model.config)
        except ValueError as error:
            raise UserError(f"a text without a context is to be scored: {error}") from None

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids as the tokenizer gives them, without an end-of-text token that it may append."""
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids = self.tokenizer(string, **special)["input_ids"]
        if len(ids) > 1 and ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id):
            ids = ids[:-1]
        return ids

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        scores = self._score_tokens([(c, t) for _, c, t in requests], self.likelihood, 1.0, [True] * len(requests))
        return [(s.value, s.is_greedy) for s in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of as many tokens as the model takes."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            found.append(sum(s.value for s in self._score_tokens(pairs, self.likelihood, 1.0, [False] * len(pairs))))
        return found

    def score(self, asked: Sequence[Asked]) -> list[Score]:
        found: dict[str, Score] = {}
        as_authors = replace(self.likelihood, name="paper", draws=PAPER_STEPS)
        for likelihood, faulty in ((self.likelihood, False), (as_authors, True)):
            part = [a for a in asked if a.faulty == faulty]
            temperature = self.paper_temperature if likelihood.name == "paper" else 1.0
            greedy = [a.greedy for a in part]
            scores = self._score_tokens([self._fitted(a) for a in part], likelihood, temperature, greedy)
            found |= {a.key: s for a, s in zip(part, scores, strict=True)}
        return [found[a.key] for a in asked]

    def size(self, asked: Asked) -> tuple[int, int]:
        if asked.max_tokens is not None or asked.middle is not None:
            return len(asked.context) + len(asked.suffix or ""), 1
        context, target = self._fitted(asked)
        short = self.likelihood.name in ("nelbo", "mask_count") and not asked.faulty
        draws = PAPER_STEPS if asked.faulty else self.likelihood.draws
        return len(context) + len(target), min(draws, 2 ** len(target) - 1) if short else draws

    def _fitted(self, asked: Asked) -> tuple[list[int], list[int]]:
        """(context, target) ids; a context too long loses its beginning. Raises UserError for a target too long."""
        context, target = encode_pair(self, asked.context, asked.continuation)
        room = self.max_length - len(target) - 1  # 1: an end-of-text token after it
        if room < 1:
            raise UserError(f"{len(target)} tokens are to be scored, but the model takes {self.max_length}")
        if len(context) > room:
            self.truncated.add(asked.key)
        return context[-room:], target

    def _score_tokens(
        self,
        pairs: Sequence[tuple[list[int], list[int]]],
        likelihood: Likelihood,
        temperature: float,
        greedy: Sequence[bool],
    ) -> list[Score]:
        """The scores of targets after their contexts; `greedy`: whether it matters if greedy decoding gives it."""
        tail = [self.eot_token_id] if likelihood.name == "dream" else []
        all_draws = [
            draw(likelihood.name, len(t), likelihood.draws, random_for(likelihood.seed, t)) for _, t in pairs
        ]  # fmt: skip
        rows = []
        for i, ((context, target), draws) in enumerate(zip(pairs, all_draws)):
            before, after = np.zeros(len(context), bool), np.zeros(len(tail), bool)
            for k in np.flatnonzero(draws.masked.any(axis=1)):
                masked = np.concatenate([before, draws.masked[k], after])
                rows.append(Row(context + target + tail, masked, (i, int(k))))
        ce = [np.zeros(len(draws.weights)) for draws in all_draws]
        for row, loss in zip(rows, self._cross_entropies(rows, temperature), strict=True):
            ce[row.owner[0]][row.owner[1]] = loss
        asked = [i for i, wanted in enumerate(greedy) if wanted]
        given = dict(zip(asked, self._greedy_gives([pairs[i] for i in asked])))
        scores = []
        for i, ((_, target), draws, losses) in enumerate(zip(pairs, all_draws, ce)):
            bound, error = estimate(draws, losses)
            scores.append(Score(-bound, error, len(target), given.get(i, False)))
        return scores

    @torch.no_grad()
    def _cross_entropies(self, rows: Sequence[Row], temperature: float) -> list[float]:
        """Of each row: the cross-entropy in nats, summed over its masked tokens."""
        found = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
        for begin in range(0, len(order), self.batch_rows):
            part = order[begin : begin + self.batch_rows]
            width = len(rows[part[0]].ids)
            ids = torch.zeros(len(part), width, dtype=torch.long)
            masked, real = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
            for place, i in enumerate(part):
                length = len(rows[i].ids)
                ids[place, :length] = torch.tensor(rows[i].ids)
                masked[place, :length] = torch.from_numpy(rows[i].masked)
                real[place, :length] = True
            targets = ids[masked].to(self.device)
            inputs = ids.masked_fill(masked, self.mask_token_id).to(self.device)
            extra = {} if bool(real.all()) else {"attention_mask": real.to(self.device)}
            logits = self.model(input_ids=inputs, logits_at=masked.to(self.device), **extra).logits
            losses = torch.nn.functional.cross_entropy(logits.float() / temperature, targets, reduction="none")
            sums = torch.zeros(len(part), dtype=torch.float64, device=losses.device)
            sums.index_add_(0, masked.nonzero()[:, 0].to(losses.device), losses.double())
            for i, loss in zip(part, sums.tolist()):
                found[i] = loss
        return found

    def _greedy_gives(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether unmasking a target's tokens greedily, all of them masked at first, gives just these.

        In the order and by the rule of `settings`. A batch ends when none of its rows has been right so far.
        """
        greedy = replace(self.settings, temperature=0.0, repetition_penalty=None, remasking=0.0, compile=False)
        found: list[bool] = []
        for begin in range(0, len(pairs), self.batch_rows):
            part = pairs[begin : begin + self.batch_rows]
            wanted, real = padded_left([c + t for c, t in part])
            hidden, _ = padded_left([[0] * len(c) + [1] * len(t) for c, t in part])
            at = hidden.bool() & real.bool()
            asked = wanted.masked_fill(at, self.mask_token_id)
            right = torch.ones(len(part), dtype=torch.bool)
            arguments = {"attention_mask": real.to(self.device), "eos_token_id": -1, **vars(greedy)}
            # of the random order
            arguments["generator"] = [_generator(self.likelihood.seed, c + t) for c, t in part]
            for state in self.model.diffusion_states(asked.to(self.device), **arguments):
                ids, masked = state.ids.cpu(), state.masked.cpu()
                right &= ((ids == wanted) | masked | ~at).all(dim=1)
                if not right.any():
                    break
            found += right.tolist()
        return found

    def write(self, asked: Sequence[Asked]) -> list[str]:
        found: dict[str, str] = {}

        def alike(a: Asked) -> tuple[float, bool]:
            return a.temperature, a.faulty

        for (temperature, faulty), part in groupby(sorted(asked, key=alike), key=alike):
            settings = replace(self.settings, temperature=temperature)
            if faulty:
                settings = SamplingSettings(order="confidence", steps=PAPER_STEPS, temperature=temperature)
            group = list(part)
            for one, text in zip(group, self._decoded(group, settings), strict=True):
                found[one.key] = text
        return [found[a.key] for a in asked]

    def _decoded(self, asked: Sequence[Asked], settings: SamplingSettings) -> list[str]:
        """The texts of requests that share their settings."""
        gaps = [self._with_masks(a) for a in asked]
        ids, real = padded_left([g[0] for g in gaps])
        width = ids.shape[1]
        out = self.model.diffusion_generate(
            ids.to(self.device),
            attention_mask=real.to(self.device),
            generator=[self._generator(a) for a in asked],
            **vars(settings),
        ).cpu()
        texts = []
        for a, (row_ids, begin, count), row in zip(asked, gaps, out):
            first = width - len(row_ids) + begin
            texts.append(cut(text_of(row[first : first + count].tolist(), self.tokenizer), a.until))
        return texts

    def _with_masks(self, asked: Asked) -> tuple[list[int], int, int]:
        """(ids with masks, where they begin, how many): after the context, or in the gap as many as stood there.

        What does not fit is left out at the ends far from the masks.
        """
        shift = uses_shift(self.model.config)
        if asked.middle is None:
            count = asked.max_tokens or GENERATED
            before, after = self.tok_encode(asked.context) or [self.prefix_token_id], []
        else:
            count = max(1, len(tokens_of(asked.middle, self.tokenizer)))
            start = self.prefix_token_id if shift else None
            parts = encode_parts(
                [asked.context, count, asked.suffix or ""], self.tokenizer, self.mask_token_id, start, shift
            )
            after = tokens_of(asked.suffix, self.tokenizer) if asked.suffix else []
            before = parts[: len(parts) - count - len(after)]
        room = self.max_length - count
        if room < 1:
            raise UserError(
                f"{count} tokens are to be written, but the model takes {self.max_length}; see --max_gen_toks"
            )
        if len(before) + len(after) > room:
            self.truncated.add(asked.key)
            after = after[: max(room // 2, room - len(before))]
            before = before[-(room - len(after)) :]
        return [*before, *[self.mask_token_id] * count, *after], len(before), count

    def _generator(self, asked: Asked) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(asked, self.likelihood.seed))


def _generator(seed: int, ids: Sequence[int]) -> torch.Generator:
    """Random numbers of a row of tokens, whatever its batch."""
    return torch.Generator().manual_seed(int(random_for(seed, ids).integers(2**62)))
