"""Models whose joint distribution is known: tables of probabilities in place of networks."""

import itertools
from types import SimpleNamespace

import torch
from scipy.stats import chisquare

from pretrain.model.generation import generate
from pretrain.model.settings import SamplingSettings

MASK, VOCABULARY = 4, 5

LAW = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05])


class Oracle:
    """A model whose prediction of each position is a given function of the ids (B, L), to logits (B, L, V)."""

    def __init__(self, predict, **config):
        self.config = SimpleNamespace(mask_token_id=MASK, **config)
        self.predict, self.calls, self.asked = predict, 0, 0

    def __call__(self, input_ids, logits_at, attention_mask=None):
        self.calls += 1
        self.asked += int(logits_at.sum())
        return SimpleNamespace(logits=self.predict(input_ids)[logits_at])


class Joint(Oracle):
    """A given law of `length` tokens of a vocabulary of 3 (0, 1, 2): its conditionals are exact for any masks."""

    def __init__(self, length: int, seed: int = 0):
        super().__init__(self.conditionals)
        weights = torch.rand((3,) * length, generator=rng(seed)) ** 3
        self.law, self.length = weights / weights.sum(), length
        self.texts = torch.tensor(list(itertools.product(range(3), repeat=length)))  # (3^n, n)

    def conditionals(self, ids):
        tokens = ids[:, 1:]  # the first is the start token
        fits = (tokens[:, None] == self.texts[None]) | (tokens[:, None] == MASK)
        weight = fits.all(-1) * self.law.flatten()  # (B, 3^n)
        shown = torch.nn.functional.one_hot(self.texts, VOCABULARY).float()  # (3^n, n, V)
        probability = torch.einsum("bt,tnv->bnv", weight, shown)
        first = torch.ones(len(ids), 1, VOCABULARY)
        return torch.cat([first, probability], dim=1).log()

    def of(self, prefix: dict[int, int]) -> torch.Tensor:
        """The law of the texts, given the tokens at some positions."""
        fits = torch.ones(len(self.texts), dtype=torch.bool)
        for position, token in prefix.items():
            fits &= self.texts[:, position] == token
        law = self.law.flatten() * fits
        return law / law.sum()


def fixed(law: torch.Tensor, **config) -> Oracle:
    return Oracle(lambda x: law.log().expand(*x.shape, VOCABULARY).clone(), **config)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(batch: int, length: int) -> torch.Tensor:
    x = torch.full((batch, length), MASK)
    x[:, 0] = 0
    return x


def run(model, x, generator=None, attention_mask=None, eos=None, **settings):
    return generate(
        model,
        x,
        attention_mask,
        return_dict_in_generate=True,
        generator=generator or rng(),
        eos_token_id=eos,
        settings=SamplingSettings(**settings),
    )


def probability_of(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The p-value of counts under their expectations, rare ones put together; 0 where something impossible came."""
    if counts[expected == 0].sum() > 0:
        return 0.0
    common = expected >= 5
    found = [*counts[common].tolist(), float(counts[~common].sum())]
    wanted = [*expected[common].double().tolist(), float(expected[~common].double().sum())]
    pairs = [(f, w) for f, w in zip(found, wanted) if w >= 1]
    share = sum(f for f, _ in pairs) / sum(w for _, w in pairs)
    return 1.0 if len(pairs) == 1 else chisquare([f for f, _ in pairs], [w * share for _, w in pairs]).pvalue
