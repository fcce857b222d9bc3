"""Forms of visibility: what each shows, by its definition, and the numbers that are derived from it."""

import itertools
import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from independent import murmur

from pretrain.model.forms import ANNEALED, Bernoulli, Block, Causal, Form, Full, Window, hashed_uniform, numbers_of

lengths = st.integers(1, 24)
keys = st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**31))
widths = st.integers(0, 40)
decided = st.one_of(
    st.just(Full()), st.just(Causal()), st.builds(Window, widths), st.builds(Block, widths.map(lambda w: w + 1))
)
forms = st.one_of(decided, st.builds(Bernoulli, st.floats(0, 1), keys))


def shown(form: Form, length: int) -> torch.Tensor:
    """(L, L) bool: what `mask_mod` shows."""
    position = torch.arange(length)
    return form.mask_mod(position[:, None], position[None], *numbers_of(form))


def defined(form: Form, i: int, j: int) -> bool:
    """Does position i see position j, in words of its own."""
    if isinstance(form, Bernoulli):
        return j <= i or murmur(form.key, i, j) < torch.tensor(form.ratio).item()
    if isinstance(form, Window):
        return j <= i or j - i <= form.width
    if isinstance(form, Block):
        return j <= i or any(k * form.width <= i < j < (k + 1) * form.width for k in range(j + 1))
    return isinstance(form, Full) or j <= i


@given(forms, lengths)
def test_mask_mod_shows_what_the_definition_says(form, length):
    expected = [[defined(form, i, j) for j in range(length)] for i in range(length)]
    assert shown(form, length).tolist() == expected


@given(forms, lengths)
def test_numbers_may_be_tensors(form, length):
    """FlexAttention gets them so, in order that a compiled kernel serves every step."""
    position = torch.arange(length)
    numbers = [torch.tensor(number) for number in numbers_of(form)]
    assert len(numbers) == len(fields(form))
    assert torch.equal(form.mask_mod(position[:, None], position[None], *numbers), shown(form, length))


@given(decided, lengths)
def test_the_visible_share_is_that_of_the_mask(form, length):
    assert form.visible_share(length) == pytest.approx(shown(form, length).double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.3, 0.9, 1.0])
def test_bernoullis_visible_share_is_its_expectation(ratio):
    length = 300
    form = Bernoulli(ratio, (5, 9))
    future = length * (length - 1) / 2
    deviation = math.sqrt(ratio * (1 - ratio) * future) / length**2
    assert abs(shown(form, length).double().mean().item() - form.visible_share(length)) <= 5 * deviation + 1e-12


@given(st.floats(0, 1), lengths)
def test_bernoullis_visible_share_lies_between_causal_and_full(ratio, length):
    expected = (1 - ratio) * Causal().visible_share(length) + ratio
    assert Bernoulli(ratio).visible_share(length) == pytest.approx(expected)


@given(forms, lengths)
def test_flash_window_shows_the_same(form, length):
    """As flash kernels document `window_size`: i sees i - left to i + right, and -1 stands for no bound."""
    if isinstance(form, Bernoulli | Block):
        assert form.flash_window is None
        return
    left, right = form.flash_window
    for i, j in itertools.product(range(length), repeat=2):
        seen = (left == -1 or j >= i - left) and (right == -1 or j <= i + right)
        assert seen == defined(form, i, j)


@given(forms, lengths)
def test_simplified_shows_the_same(form, length):
    assert torch.equal(shown(form.simplified(length), length), shown(form, length))


@given(decided, st.integers(2, 24))
def test_simplified_is_full_or_causal_wherever_the_mask_is(form, length):
    mask = shown(form, length)
    simple = form.simplified(length)
    assert isinstance(simple, Full) == bool(mask.all())
    assert isinstance(simple, Causal) == torch.equal(mask, torch.ones_like(mask).tril())
    assert isinstance(simple, Full | Causal) or simple == form


def test_bernoulli_simplifies_at_its_ends_alone():
    found = [type(Bernoulli(ratio).simplified(9)) for ratio in (0.0, 1e-6, 1 - 1e-6, 1.0)]
    assert found == [Causal, Bernoulli, Bernoulli, Full]


@pytest.mark.parametrize("length", [1, 2, 17, 64])
def test_the_ends_of_each_form_are_causal_and_full(length):
    full, causal = torch.ones(length, length).bool(), torch.ones(length, length).bool().tril()
    for first, last in (
        (Window(0), Window(max(length - 1, 1))),
        (Block(1), Block(max(length, 2))),
        (Bernoulli(0.0), Bernoulli(1.0)),
    ):
        assert torch.equal(shown(first, length), causal) and torch.equal(shown(last, length), full)
        if length > 1:
            assert isinstance(first.simplified(length), Causal)
        assert isinstance(last.simplified(length), Full)
    if length > 2:
        assert not isinstance(Window(length - 2).simplified(length), Full)
        assert not isinstance(Block(length - 1).simplified(length), Full)


def test_window_grows_in_proportion_and_block_by_doublings():
    windows = [Window.at(p / 8, 65, (0, 0)).width for p in range(9)]
    assert windows == [0, 8, 16, 24, 32, 40, 48, 56, 64]
    blocks = [Block.at(p / 50, 100, (0, 0)).width for p in range(51)]
    assert blocks == sorted(blocks) and blocks[-1] == 100
    assert set(blocks[:-1]) == {1, 2, 4, 8, 16, 32, 64, 100}
    assert max(blocks.count(w) for w in (2, 4, 8, 16, 32)) - min(blocks.count(w) for w in (2, 4, 8, 16, 32)) <= 1


def test_what_a_step_reports():
    assert Window(7).metrics() == {"right_context": 7} and Block(8).metrics() == {"block_size": 8}
    assert not any(form.metrics() for form in (Full(), Causal(), Bernoulli(0.5)))
    assert {name: form.name for name, form in ANNEALED.items()} == {name: name for name in ANNEALED}


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_bernoulli_shows_its_share_of_the_future_and_all_of_the_past(ratio):
    mask = shown(Bernoulli(ratio, (5, 9)), 300)
    assert mask.tril().sum() == 300 * 301 / 2
    future = mask[torch.triu(torch.ones(300, 300, dtype=torch.bool), 1)].double()
    assert abs(future.mean().item() - ratio) <= 5 * math.sqrt(ratio * (1 - ratio) / len(future))


def test_bernoulli_is_a_function_of_seed_and_step():
    def draw(seed: int, step: int) -> torch.Tensor:
        return shown(Bernoulli(0.5, (seed, step)), 128)

    assert torch.equal(draw(1, 2), draw(1, 2))
    for other in ((2, 1), (1, 3), (0, 3), (1 + 2**32, 2)):  # neither the sum of the pair nor its low bits are the key
        assert 0.4 < (draw(1, 2) != draw(*other)).double().triu(1).sum() / (128 * 127 / 2) < 0.6


@given(keys, st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_the_hash_is_murmurs_with_tensors_as_with_numbers(key, i, j):
    where = torch.tensor(i), torch.tensor(j)
    assert hashed_uniform(key, *where).item() == murmur(key, i, j)
    assert hashed_uniform(torch.tensor(key), *where).item() == murmur(key, i, j)
