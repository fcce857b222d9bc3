import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from pretrain.data import NOISE, TrainData, collate, mixture_pattern, permute, step_data, stream

MASK = 384


@pytest.fixture(scope="module")
def data(corpus_dir) -> TrainData:
    return TrainData(str(corpus_dir), MASK, seed=3)


@given(st.integers(1, 700), st.integers(0, 2**60), st.integers(0, 2**60))
@settings(deadline=None)
def test_permute_is_a_bijection(size, seed, n):
    assert sorted(permute(i, size, seed, n) for i in range(size)) == list(range(size))


def test_permute_depends_on_its_key_and_looks_random():
    orders = [[permute(i, 1000, *key) for i in range(1000)] for key in ((1, 2), (2, 1), (1, 3))]
    for a in range(3):
        assert abs(np.corrcoef(np.arange(1000), orders[a])[0, 1]) < 0.15
        assert sum(x == y for x, y in zip(orders[a], orders[a - 1])) < 10


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
@settings(deadline=None)
def test_every_prefix_of_the_mixture_is_within_one_sample_of_its_share(weights):
    pattern = mixture_pattern([float(w) for w in weights])
    shares = np.array(weights) / sum(weights)
    counts = np.cumsum(np.eye(len(weights))[pattern], axis=0)
    assert np.abs(counts - np.arange(1, len(pattern) + 1)[:, None] * shares).max() < 1
    np.testing.assert_allclose(counts[-1], shares * len(pattern), atol=1e-6)  # so it may be repeated


def test_the_papers_mixture():
    pattern = mixture_pattern([0.693584, 0.306416])
    assert np.bincount(pattern).tolist() == [0.693584 * len(pattern), 0.306416 * len(pattern)]
    with pytest.raises(UserError, match="write them with fewer digits"):
        mixture_pattern([0.123456789, 0.3])


def test_an_epoch_shows_every_row_once_and_epochs_differ(data):
    seen: dict[tuple[int, int], list[int]] = {}
    for n in range(4 * sum(len(rows) for rows in data.train)):
        source, epoch, row = data.place(n)
        seen.setdefault((source, epoch), []).append(row)
    complete = {key: rows for key, rows in seen.items() if (key[0], key[1] + 1) in seen}
    assert {key[0] for key in complete} == {0, 1}
    for (source, _), rows in complete.items():
        assert sorted(rows) == list(range(len(data.train[source])))
    assert seen[0, 0] != sorted(seen[0, 0])
    epochs = [rows for (source, _), rows in sorted(complete.items()) if source == 1]
    assert len(epochs) >= 2 and epochs[0] != epochs[1]


def test_a_sample_is_a_function_of_seed_and_number(corpus_dir, data):
    again = TrainData(str(corpus_dir), MASK, seed=3)
    for n in (0, 17, 5, 0):
        a, b = data.sample(n), again.sample(n)
        assert a.t == b.t
        np.testing.assert_array_equal(a.xt, b.xt)
        np.testing.assert_array_equal(a.masked, b.masked)
    assert TrainData(str(corpus_dir), MASK, seed=4).sample(0).t != data.sample(0).t


def test_neighbouring_seeds_share_no_stream():
    """With seed + n as key, (1, 2) and (2, 1) would draw the same noise."""
    draws = {stream(seed, n, NOISE).random() for seed in range(20) for n in range(20)}
    assert len(draws) == 400


def test_times_are_uniform(data):
    times = np.sort([data.sample(n).t for n in range(2000)])
    expected = 1e-3 + (1 - 1e-3) * (np.arange(2000) + 0.5) / 2000
    assert np.abs(times - expected).max() < 1.95 / np.sqrt(2000)  # Kolmogorov-Smirnov, p = 0.001


@pytest.mark.parametrize("isolated", [False, True])
def test_a_batch_is_the_same_however_it_is_split(corpus_dir, isolated):
    data = TrainData(str(corpus_dir), MASK, seed=3, isolated=isolated)

    def rows(world: int, micro: int) -> list:
        parts = [step_data(data, 5, 12, micro, rank, world) for rank in range(world)]
        assert len({(part.masked, part.maskable) for part in parts}) == 1
        batches = [batch for part in parts for batch in part.batches]
        assert parts[0].masked == sum(len(batch.t) for batch in batches)
        return sorted(torch.cat([torch.cat([b.xt, b.labels], 1) for b in batches]).tolist()), parts[0].maskable

    assert rows(1, 12) == rows(1, 3) == rows(2, 6) == rows(3, 2) == rows(4, 1)


def test_collate_isolated(corpus_dir):
    data = TrainData(str(corpus_dir), MASK, seed=3, isolated=True)
    samples = [data.sample(n) for n in range(30)]
    assert max(len(s.document_lengths) for s in samples) > 1
    batch = collate(samples, isolated=True)
    for row, sample in enumerate(samples):
        start = 0
        for number, length in enumerate(sample.document_lengths.tolist()):
            assert (batch.documents[row, start : start + length] == number).all()
            assert batch.positions[row, start : start + length].tolist() == list(range(length))
            assert batch.labels[row, start] == -100
            start += length
    assert (batch.labels != -100).sum() == len(batch.t)
    assert torch.equal(
        batch.labels[batch.labels != -100], torch.tensor(np.concatenate([s.x0[s.masked] for s in samples]))
    )


def test_validation_noise_never_changes(corpus_dir, data):
    other = TrainData(str(corpus_dir), MASK, seed=99)
    for a, b in zip(data.validation_samples(8), other.validation_samples(8), strict=True):
        np.testing.assert_array_equal(a.xt, b.xt)
    times = [s.t for s in data.validation_samples(8)[: min(8, len(data.validation[0]))]]
    assert times == sorted(times)  # one in each equal part of (0, 1]
    assert {s.t for s in data.validation_samples(4, time=0.5)} == {0.5}


def test_unknown_source(corpus_dir):
    with pytest.raises(UserError, match=r"data.weights names \['nope'\]; .* has \['long', 'short'\]"):
        TrainData(str(corpus_dir), MASK, seed=0, weights={"nope": 1.0})


def test_stratified_times_fill_every_part_once_a_batch(corpus_dir):
    size = 16
    data = TrainData(str(corpus_dir), MASK, seed=3, times="stratified", global_batch=size)
    orders = []
    for step in range(4):
        t = np.array([data.sample(n).t for n in range(step * size, (step + 1) * size)])
        parts = np.floor((t - data.eps) / (1 - data.eps) * size).astype(int)
        assert sorted(parts) == list(range(size))
        orders.append(parts.tolist())
    assert len(set(map(tuple, orders))) == 4  # which row gets which part changes


def test_complementary_masks_mask_every_token_once_a_pair(corpus_dir):
    data = TrainData(str(corpus_dir), MASK, seed=3, times="complementary", global_batch=8)
    for n in range(0, 40, 2):
        a, b = data.sample(n), data.sample(n + 1)
        np.testing.assert_array_equal(a.x0, b.x0)
        np.testing.assert_array_equal(a.masked ^ b.masked, a.maskable)
        assert not (a.masked & b.masked).any() and a.t + b.t == pytest.approx(1)
        assert min(a.t, b.t) >= data.eps
        for s in (a, b):
            np.testing.assert_array_equal(s.xt, np.where(s.masked, MASK, s.x0))
    assert data.place(0) == TrainData(str(corpus_dir), MASK, seed=3).place(0)


@pytest.mark.parametrize("times", ["independent", "stratified", "complementary"])
def test_times_are_uniform_and_masks_have_their_share(corpus_dir, times):
    data = TrainData(str(corpus_dir), MASK, seed=5, times=times, global_batch=8)
    samples = [data.sample(n) for n in range(800)]
    t = np.sort([s.t for s in samples])
    assert np.abs(t - (np.arange(800) + 0.5) / 800).max() < 0.07  # Kolmogorov-Smirnov
    masked = sum(s.masked.sum() for s in samples)
    expected = sum(s.t * s.maskable.sum() for s in samples)
    assert masked == pytest.approx(expected, rel=0.03)


def test_what_was_consumed_is_what_was_drawn(corpus_dir):
    for times in ("independent", "complementary"):
        data = TrainData(str(corpus_dir), MASK, seed=3, times=times, global_batch=2)
        for count in (0, 2, 10, 126):
            rows = {n // 2 if times == "complementary" else n for n in range(count)}
            sources = [data.place(n)[0] for n in rows]
            found = {name: sources.count(i) for i, name in enumerate(data.names)}
            assert data.consumed(count) == found
