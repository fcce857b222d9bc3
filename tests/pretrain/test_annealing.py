"""From causal to bidirectional: how far a step has come, and which form of visibility that is."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.annealing import annealed_form, annealing_progress
from pretrain.config import AnnealingConfig
from pretrain.model.forms import ANNEALED, Bernoulli, Block, Full, Window, numbers_of

SCHEDULES = ["linear", "cosine", "stepwise"]


def test_annealing_is_linear_then_full():
    ratios = [annealing_progress(step, 10) for step in range(15)]
    np.testing.assert_allclose(ratios[:10], np.arange(1, 11) / 10)
    assert ratios[9:] == [1.0] * 6
    assert annealing_progress(0, 0) == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_annealing_schedules_grow_from_causal_to_full(schedule):
    progress = [annealing_progress(step, 40, schedule, stages=4) for step in range(50)]
    assert progress == sorted(progress) and 0 < progress[0] <= 0.25 and progress[39:] == [1.0] * 11
    if schedule == "stepwise":
        assert sorted(set(progress)) == [0.25, 0.5, 0.75, 1.0]
        assert [progress.count(p) for p in (0.25, 0.5, 0.75)] == [10, 10, 10]
    if schedule == "cosine":
        assert progress[:40] == pytest.approx([0.5 - 0.5 * math.cos(math.pi * n / 40) for n in range(1, 41)])
    for form, causal in (("window", 0), ("block", 1)):
        widths = [ANNEALED[form].at(p, 100, (0, 0)).width for p in (0, *progress)]
        assert widths == sorted(widths) and widths[0] == causal
        assert widths[-1] == {"window": 99, "block": 100}[form]
    assert {Block.at(p / 50, 100, (0, 0)).width for p in range(51)} == {1, 2, 4, 8, 16, 32, 64, 100}


@pytest.mark.parametrize("name", ANNEALED)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("length", [1, 7, 64])
def test_what_is_visible_is_not_hidden_again(name, schedule, length):
    """Whatever the steps in which it grows, for one draw of the random form."""
    position = torch.arange(length)

    def shown(progress: float) -> torch.Tensor:
        form = ANNEALED[name].at(progress, length, (1, 2))
        return form.mask_mod(position[:, None], position[None], *numbers_of(form))

    masks = [shown(p) for p in (0.0, *(annealing_progress(step, 12, schedule, stages=4) for step in range(14)))]
    full = torch.ones(length, length).bool()
    assert torch.equal(masks[0], full.tril()) and torch.equal(masks[-1], full)
    assert all((a <= b).all() for a, b in itertools.pairwise(masks))
    if length == 64:
        assert len({mask.sum().item() for mask in masks}) > 3


@given(st.integers(0, 2**62), st.integers(0, 8), st.sampled_from(list(ANNEALED)))
def test_the_form_of_a_step(seed, step, name):
    """Its progress, and for the random form its own draw; all ranks make the same from (seed, step)."""
    form, progress = annealed_form(AnnealingConfig(form=name, steps=10), step, 64, seed)
    assert progress == pytest.approx((step + 1) / 10)
    expected = {
        "bernoulli": lambda: Bernoulli(progress, (seed, step)),
        "window": lambda: Window(round(63 * progress)),
        "block": lambda: Block(min(64, 2 ** round(6 * progress))),
    }
    assert form == expected[name]()


def test_no_annealing_and_its_end_are_full():
    assert annealed_form(AnnealingConfig(form="none", steps=10), 0, 64, 1) == (Full(), 1.0)
    for name in ANNEALED:
        forms = [annealed_form(AnnealingConfig(form=name, steps=3), step, 64, 1)[0] for step in range(5)]
        assert [form == Full() for form in forms] == [False, False, True, True, True]
