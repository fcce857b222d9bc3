"""The rules that pick masks, against their definitions written out in plain Python, a row at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.model import rules
from pretrain.model.rules import Proposals

levels = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0])  # ties are likely
row = st.lists(st.tuples(st.booleans(), levels), min_size=7, max_size=7)
batch = st.lists(row, min_size=1, max_size=3)


def tensors(rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(candidates, values), (B, 7)."""
    return (
        torch.tensor([[mask for mask, _ in r] for r in rows]),
        torch.tensor([[value for _, value in r] for r in rows], dtype=torch.float64),
    )


def by_row(rows, pick) -> list[list[bool]]:
    """What `pick(list of (position, value) of the candidates)` gives, as a mask of each row."""
    chosen = [set(pick([(i, value) for i, (mask, value) in enumerate(r) if mask])) for r in rows]
    return [[i in found for i in range(7)] for found in chosen]


def ordered(items):
    return [i for i, _ in sorted(items, key=lambda item: (-item[1], item[0]))]


@given(batch, st.integers(0, 9))
def test_best_takes_the_highest_and_of_equals_the_left(rows, count):
    candidates, values = tensors(rows)
    expected = by_row(rows, lambda items: ordered(items)[:count])
    assert rules.best(values, candidates, count).tolist() == expected
    counts = torch.arange(len(rows))[:, None]
    assert [r.sum() for r in rules.best(values, candidates, counts)] == [
        min(k, int(c.sum())) for k, c in enumerate(candidates)
    ]


@given(batch)
def test_a_row_does_not_depend_on_its_batch(rows):
    candidates, values = tensors(rows)
    proposals = Proposals(values.long(), values, values, values * 2, torch.full(values.shape, 2))
    choices = [
        lambda c, p: rules.best(p.confidence, c, 2),
        lambda c, p: rules.above_threshold(p, c, 0.5),
        lambda c, p: rules.by_factor(p, c, 1.0),
        lambda c, p: rules.within_entropy_bound(p, c, 1.0),
        lambda c, p: rules.calm_and_confident(p, c, 0.5),
    ]
    for choose in choices:
        together = choose(candidates, proposals)
        for k in range(len(rows)):
            alone = Proposals(*(getattr(proposals, name)[k : k + 1] for name in vars(proposals)))
            assert torch.equal(together[k : k + 1], choose(candidates[k : k + 1], alone))
            assert not (together & ~candidates).any()


@given(batch, levels)
def test_threshold(rows, threshold):
    candidates, confidence = tensors(rows)
    expected = by_row(rows, lambda items: [i for i, c in items if c > threshold])
    assert rules.above_threshold(Proposals(candidates, confidence), candidates, threshold).tolist() == expected


@given(batch, st.sampled_from([0.0, 0.15, 0.5, 1.0, 2.5]))
def test_factor(rows, factor):
    candidates, confidence = tensors(rows)

    def pick(items):
        order, value = ordered(items), dict(items)
        fitting = [n for n in range(1, len(order) + 1) if (n + 1) * (1 - value[order[n - 1]]) < factor]
        return order[: max(fitting, default=0)]

    assert rules.by_factor(Proposals(candidates, confidence), candidates, factor).tolist() == by_row(rows, pick)


@given(batch, st.sampled_from([0.0, 0.2, 0.4, 1.1]))
def test_entropy_bound(rows, bound):
    candidates, entropy = tensors(rows)

    def pick(items):
        order = [i for i, _ in sorted(items, key=lambda item: (item[1], item[0]))]
        value, taken = dict(items), []
        for n in range(1, len(order) + 1):
            chosen = [value[i] for i in order[:n]]
            if sum(chosen) - max(chosen) > bound + 1e-12:
                break
            taken = order[:n]
        return taken

    found = rules.within_entropy_bound(Proposals(candidates, entropy, entropy=entropy), candidates, bound + 1e-12)
    assert found.tolist() == by_row(rows, pick)
    assert torch.equal(found.any(1), candidates.any(1)), "the best one always fits: its sum less itself is 0"


@given(batch, levels, st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_klass(rows, threshold, calm):
    candidates, confidence = tensors(rows)
    proposals = Proposals(candidates, confidence, calm=torch.tensor(calm).expand(len(rows), -1))
    expected = by_row(rows, lambda items: [i for i, c in items if c > threshold and calm[i] >= 2])
    assert rules.calm_and_confident(proposals, candidates, threshold).tolist() == expected


@given(batch, levels, st.integers(0, 5))
def test_wino_takes_back_fewer_than_were_drafted(rows, threshold, before):
    drafted, verified = tensors(rows)

    def pick(items):
        bad = sorted((value, i) for i, value in items if value < threshold)
        return [i for _, i in bad[: max(0, before - 1)]]

    found = rules.doubtful(verified, drafted, threshold, torch.full((len(rows), 1), before))
    assert found.tolist() == by_row(rows, pick)


def test_algorithm_2_commits_each_mask_with_probability_one_over_k():
    candidates = torch.ones(1, 200_000, dtype=torch.bool)
    candidates[0, ::2] = False
    uniform = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0))
    for k in (1, 2, 5, 40):
        found = rules.independently(uniform, candidates, torch.tensor([[k]]))
        assert not (found & ~candidates).any()
        share = float(found.sum() / candidates.sum())
        assert abs(share - 1 / k) <= 5 * math.sqrt(1 / k * (1 - 1 / k) / 100_000)


def test_remasking_spares_certain_tokens_and_given_ones():
    confidence = torch.tensor([[1.0, 0.0, 0.5]]).repeat_interleave(100_000, 1)
    committed = torch.ones_like(confidence, dtype=torch.bool)
    committed[:, 150_000:200_000] = False
    uniform = torch.rand(confidence.shape, generator=torch.Generator().manual_seed(0))
    found = rules.forgotten(uniform, confidence, committed, 0.4)
    assert not found[:, :100_000].any() and not found[:, 150_000:200_000].any()
    assert abs(found[:, 100_000:150_000].float().mean() - 0.4) < 0.01
    assert abs(found[:, 200_000:].float().mean() - 0.2) < 0.01


def test_scores_name_what_they_rank_by():
    proposals = Proposals(torch.zeros(1, 2), torch.tensor([[0.6, 0.5]]), torch.tensor([[0.3, 0.4]]))
    assert torch.equal(rules.score("confidence", proposals), proposals.confidence)
    assert torch.equal(rules.score("margin", proposals), proposals.margin)
    with pytest.raises(ValueError, match="hold no entropy"):
        rules.score("entropy", proposals)
    proposals.entropy = torch.tensor([[1.0, 2.0]])
    assert rules.score("entropy", proposals).argmax() == 0
