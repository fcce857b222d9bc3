"""What a batch of masked diffusion is made of: the mathematics as functions, and the noise of its rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from independent import (
    Row,
    Source,
    corrupted,
    made_up,
)
from masked import LENGTH, MASK, ROWS, SEED, TIMES, WHOLE, batch_of, masked_in, objective, times_of

from common.config import load_config
from pretrain.config import RunConfig
from pretrain.data import TrainData
from pretrain.model.forms import Bernoulli, Block, Full
from pretrain.model.modeling_diffullama import IGNORE
from pretrain.objectives.masked_diffusion import MaskedDiffusion, bucket_means, bucket_sums, corrupt, sample_time
from pretrain.step import read_step

# --- the mathematics


@given(st.floats(0.01, 1.0), st.integers(0, 10_000))
def test_corrupt_masks_each_maskable_token_with_probability_t(t, seed):
    rng = np.random.default_rng(seed)
    x0, maskable = rng.integers(0, 20, 4000), rng.random(4000) < 0.7
    xt, masked = corrupt(x0, maskable, np.float64(t), rng.random(4000), MASK)
    assert (xt[masked] == MASK).all() and (xt[~masked] == x0[~masked]).all()
    assert not masked[~maskable].any()
    expected, count = t * maskable.sum(), maskable.sum()
    assert abs(masked.sum() - expected) < 6 * math.sqrt(count * t * (1 - t)) + 1


def test_corrupt_is_the_same_on_tensors_and_arrays():
    rng = np.random.default_rng(0)
    x0, u, t = rng.integers(0, 20, (3, 50)), rng.random((3, 50)), rng.random(3)
    maskable = np.ones((3, 50), dtype=bool)
    arrays = corrupt(x0, maskable, t, u, MASK)
    tensors = corrupt(*(torch.from_numpy(a) for a in (x0, maskable, t, u)), MASK)
    for array, tensor in zip(arrays, tensors):
        np.testing.assert_array_equal(array, tensor.numpy())


def test_a_mask_id_in_the_data_is_not_masked():
    """The authors' code finds masked positions by comparing ids; here the noise decides."""
    x0 = np.full(100, MASK)
    _, masked = corrupt(x0, np.ones(100, dtype=bool), np.float64(0.3), np.linspace(0, 1, 100), MASK)
    assert masked.sum() == 30
    source = Source([Row(n, np.full(200, MASK), [200]) for n in range(8)])
    batch = batch_of(source)
    expected = [corrupted(row, SEED).masked for row in source.rows]
    np.testing.assert_array_equal(masked_in(batch), expected)
    assert 0 < batch.counts["labelled"] < 8 * 199


def test_time_lies_between_eps_and_one():
    u = torch.linspace(0, 1, 11)
    t = sample_time(u, 1e-3)
    torch.testing.assert_close(t, (1 - 1e-3) * u + 1e-3)


@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=30), st.integers(0, 99))
def test_buckets_of_time(times, seed):
    t = torch.tensor(times)
    nll = torch.rand(len(t), generator=torch.Generator().manual_seed(seed)) * 9
    expected = {}
    for low, high in ((0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.01)):
        inside = [n for n, time in zip(nll.tolist(), t.tolist()) if low < time <= high]
        if inside:
            expected[f"ce_to_t{min(high, 1):g}"] = pytest.approx(np.mean(inside))
    assert bucket_means(bucket_sums(nll, t), "ce") == expected


# --- the noise of a batch


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=4), st.booleans())
def test_what_nothing_predicts_and_padding_are_never_masked(lengths, shift):
    """At times near 1 all the rest is."""
    source = made_up(lengths, max(map(sum, lengths)))
    for isolated in (False, True):
        overrides = "diffusion.eps=0.9999999", f"diffusion.shift={str(shift).lower()}"
        batch = batch_of(source, *overrides, isolated=isolated)
        expected = np.zeros(masked_in(batch).shape, dtype=bool)
        for k, parts in enumerate(lengths):
            expected[k, : sum(parts)] = True
            if shift:
                expected[k, source.rows[k].starts if isolated else [0]] = False
        np.testing.assert_array_equal(masked_in(batch), expected)
        assert batch.counts == {"labelled": expected.sum(), "maskable": expected.sum()}


@pytest.mark.parametrize("settings", [[], ["diffusion.time_sampling=complementary"], ["diffusion.shift=false"]])
@pytest.mark.parametrize("isolated", [False, True], ids=["rows", "documents"])
def test_a_batch_is_the_documented_noise_on_its_rows(settings, isolated):
    """Drawn anew from (seed, row number): ids, labels, times, weights, documents, positions and counts."""
    source = made_up(ROWS, LENGTH, first=6)
    batch = batch_of(source, *settings, isolated=isolated)
    pairs, shift = "diffusion.time_sampling=complementary" in settings, "diffusion.shift=false" not in settings
    noised = [corrupted(row, SEED, shift=shift, isolated=isolated, pairs=pairs) for row in source.rows]
    tensors = batch.tensors
    np.testing.assert_array_equal(tensors["input_ids"], [c.ids(MASK) for c in noised])
    np.testing.assert_array_equal(tensors["labels"], [np.where(c.masked, c.row.ids, -100) for c in noised])
    np.testing.assert_allclose(times_of(batch), [c.t for c in noised], rtol=1e-7)
    counts = {name: sum(int(getattr(c, name).sum()) for c in noised) for name in ("masked", "maskable")}
    assert batch.counts == {"labelled": counts["masked"], "maskable": counts["maskable"]}
    by_row = [1 / (c.t * counts["masked"]) for c in noised]
    np.testing.assert_allclose(tensors["loss_weights"], np.broadcast_to(by_row, (LENGTH, 6)).T, rtol=1e-6)
    assert ("documents" in tensors) == ("position_ids" in tensors) == isolated
    if isolated:
        for k, row in enumerate(source.rows):
            for number, (start, n) in enumerate(zip(row.starts, row.lengths)):
                assert set(tensors["documents"][k, start : start + n].tolist()) == {number}
                assert tensors["position_ids"][k, start : start + n].tolist() == list(range(n))


def test_noise_is_a_function_of_seed_and_number_alone():
    source = made_up([WHOLE] * 8, LENGTH)
    again = Source(source.rows[::-1])
    a, b = batch_of(source), batch_of(again, step=7)
    for name in ("input_ids", "labels", "t"):
        assert torch.equal(a.tensors[name], b.tensors[name].flip(0))
    assert not torch.equal(a.tensors["t"], batch_of(source, "train.seed=43").tensors["t"])
    assert len(set(times_of(a))) == 8


@pytest.mark.parametrize("times", TIMES)
def test_times_are_uniform_and_masks_have_their_share(times):
    source = made_up([WHOLE] * 800, LENGTH)
    settings = "train.seed=5", f"diffusion.time_sampling={times}", "train.global_batch_size=8"
    batch = batch_of(source, *settings)
    t = np.sort(times_of(batch))
    distance = np.abs(t - (1e-3 + (1 - 1e-3) * (np.arange(800) + 0.5) / 800)).max()
    assert distance < 1.95 / np.sqrt(400 if times == "complementary" else 800)  # Kolmogorov-Smirnov, p = 0.001
    masked = masked_in(batch)
    expected = times_of(batch).sum() * (LENGTH - 1)
    spread = math.sqrt((times_of(batch) * (1 - times_of(batch))).sum() * (LENGTH - 1))
    assert abs(masked.sum() - expected) < 5 * spread


def test_stratified_times_fill_every_part_once_a_batch():
    size, eps, orders = 16, 1e-3, []
    for step in range(4):
        source = made_up([WHOLE] * size, LENGTH, first=step * size)
        batch = batch_of(source, "diffusion.time_sampling=stratified", f"train.global_batch_size={size}", step=step)
        parts = np.floor((times_of(batch) - eps) / (1 - eps) * size).astype(int)
        assert sorted(parts) == list(range(size))
        orders.append(tuple(parts.tolist()))
    assert len(set(orders)) == 4  # which row gets which part changes


def test_complementary_masks_mask_every_token_once_a_pair(corpus_dir):
    settings = "diffusion.time_sampling=complementary", "train.global_batch_size=40"
    made = objective(*settings)
    data = TrainData(str(corpus_dir), seed=SEED, repeats=made.repeats)
    (batch,) = read_step(data, made, 0, range(40))
    ids, labels, t = batch.tensors["input_ids"].numpy(), batch.tensors["labels"].numpy(), times_of(batch)
    for a, b in zip(range(0, 40, 2), range(1, 40, 2)):
        one, other = labels[a] != IGNORE, labels[b] != IGNORE
        assert not (one & other).any() and (one | other).tolist() == [False] + [True] * 31
        x0 = np.where(one, labels[a], ids[a])
        np.testing.assert_array_equal(x0, np.where(other, labels[b], ids[b]))
        assert t[a] + t[b] == pytest.approx(1) and min(t[a], t[b]) >= 1e-3 - 1e-8
        for row, masked in ((a, one), (b, other)):
            np.testing.assert_array_equal(ids[row], np.where(masked, MASK, x0))
    assert data.locate(0) == TrainData(str(corpus_dir), seed=SEED).locate(0)
    assert batch.counts == {"labelled": 20 * 31, "maskable": 40 * 31}


@pytest.mark.parametrize("isolated", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("times", TIMES)
def test_a_batch_is_the_same_however_it_is_split(corpus_dir, isolated, times):
    made = objective(f"diffusion.time_sampling={times}", "train.global_batch_size=12", "annealing.form=window")
    data = TrainData(str(corpus_dir), seed=SEED, repeats=made.repeats)

    def rows(world: int, micro: int) -> list:
        parts = [read_step(data, made, 5, range(60, 72), rank, world, micro, isolated) for rank in range(world)]
        assert {len(batches) for batches in parts} == {12 // world // micro}
        batches = [batch for batches in parts for batch in batches]
        assert len({(str(b.counts), b.form, str(b.notes)) for b in batches}) == 1
        assert batches[0].counts["labelled"] == sum(int(masked_in(b).sum()) for b in batches)
        assert all(len(tensor) == micro for b in batches for tensor in b.tensors.values())
        names = sorted(batches[0].tensors)
        content = [[b.tensors[name].reshape(micro, -1).double() for name in names] for b in batches]
        return sorted(torch.cat([torch.cat(tensors, 1) for tensors in content]).tolist()), batches[0].counts

    whole = rows(1, 12)
    assert all(rows(*split) == whole for split in ((1, 3), (2, 6), (3, 2), (4, 1)))


def test_the_form_is_that_of_the_step():
    source = made_up([WHOLE], LENGTH)
    first = batch_of(source, "annealing.steps=4", step=0)
    assert first.form == Bernoulli(0.25, (SEED, 0)) and first.notes == {"anneal_ratio": 0.25}
    assert batch_of(source, "annealing.steps=4", step=3).form == Full()
    block = batch_of(source, "annealing.steps=4", "annealing.form=block", step=1)
    assert isinstance(block.form, Block) and block.notes == {"anneal_ratio": 0.5, "block_size": block.form.width}
    none = batch_of(source, "annealing.form=none")
    assert none.form == Full() and none.notes == {"anneal_ratio": 1.0}
    names = [[form.name for form in MaskedDiffusion.forms(load_config(RunConfig, None, [f"annealing.form={name}"]))]
             for name in ("bernoulli", "window", "block", "none")]  # fmt: skip
    assert names == [["bernoulli", "full"], ["window", "full"], ["block", "full"], ["full"]]
