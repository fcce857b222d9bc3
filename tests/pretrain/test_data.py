import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from independent import Row, Source, random_numbers

from common.errors import UserError
from pretrain.data import NOISE, ORDER, VALIDATION, TrainData, mixture_pattern, permute, stream
from pretrain.step import read_rows


@pytest.fixture(scope="module")
def data(corpus_dir) -> TrainData:
    return TrainData(str(corpus_dir), seed=3)


@given(st.integers(1, 700), st.integers(0, 2**60), st.integers(0, 2**60))
def test_permute_is_a_bijection(size, seed, n):
    assert sorted(permute(i, size, seed, n) for i in range(size)) == list(range(size))


def test_permute_depends_on_its_key_and_looks_random():
    orders = [[permute(i, 1000, *key) for i in range(1000)] for key in ((1, 2), (2, 1), (1, 3))]
    for a in range(3):
        assert abs(np.corrcoef(np.arange(1000), orders[a])[0, 1]) < 0.15
        assert sum(x == y for x, y in zip(orders[a], orders[a - 1])) < 10


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
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
        source, epoch, row = data.locate(n)
        seen.setdefault((source, epoch), []).append(row)
    complete = {key: rows for key, rows in seen.items() if (key[0], key[1] + 1) in seen}
    assert {key[0] for key in complete} == {0, 1}
    for (source, _), rows in complete.items():
        assert sorted(rows) == list(range(len(data.train[source])))
    assert seen[0, 0] != sorted(seen[0, 0])
    epochs = [rows for (source, _), rows in sorted(complete.items()) if source == 1]
    assert len(epochs) >= 2 and epochs[0] != epochs[1]


def test_the_order_is_a_function_of_the_seed(corpus_dir, data):
    order = [data.locate(n) for n in range(100)]
    assert order == [TrainData(str(corpus_dir), seed=3).locate(n) for n in range(100)]
    other = TrainData(str(corpus_dir), seed=4)
    assert order != [other.locate(n) for n in range(100)]
    assert [source for source, *_ in order] == [other.locate(n)[0] for n in range(100)]  # the mixture is exact


def test_the_mixture_is_the_manifests_or_the_runs(corpus_dir, data):
    counts = np.bincount([data.locate(n)[0] for n in range(400)])
    assert dict(zip(data.names, counts.tolist())) == {"short": 300, "long": 100}
    assert data.describe(0) == {"n": 0, "source": data.names[data.locate(0)[0]], "epoch": 0, "row": data.locate(0)[2]}
    alone = TrainData(str(corpus_dir), seed=3, weights={"long": 2.0, "short": 0.0})
    assert alone.names == ["long"] and {alone.locate(n)[0] for n in range(50)} == {0}


def test_streams_are_those_that_are_documented():
    assert (NOISE, ORDER, VALIDATION) == (0, 1, 2)
    for seed, n, purpose in ((1, 2, NOISE), (2, 1, ORDER), (0, 7, VALIDATION)):
        np.testing.assert_array_equal(stream(seed, n, purpose).random(5), random_numbers(seed, n, purpose).random(5))


def test_neighbouring_seeds_share_no_stream():
    """With seed + n as key, (1, 2) and (2, 1) would draw the same noise."""
    draws = {stream(seed, n, NOISE).random() for seed in range(20) for n in range(20)}
    assert len(draws) == 400
    assert len({stream(1, 2, purpose).random() for purpose in (NOISE, ORDER, VALIDATION)}) == 3


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 5))
def test_rows_say_where_documents_are(lengths, spare):
    """Documents number their tokens and restart their positions; what is left of a row is padding, one more document.

    First tokens are the row's alone, or every document's where these are isolated.
    """
    total = max(map(sum, lengths)) + spare
    source = Source([Row(10 + k, np.arange(total) + 100 * k, parts) for k, parts in enumerate(lengths)])
    shared = read_rows(source.places, source.numbers, isolated=False)
    isolated = read_rows(source.places, source.numbers, isolated=True)
    for rows in (shared, isolated):
        assert rows.numbers == source.numbers and rows.x0.dtype == np.int64
        np.testing.assert_array_equal(rows.x0, [row.ids for row in source.rows])
        assert rows.real.sum(axis=1).tolist() == [sum(parts) for parts in lengths]
        assert all((row[:-1] >= row[1:]).all() for row in rows.real)  # padding ends a row
    assert shared.documents is None and shared.positions is None
    assert np.argwhere(shared.first).tolist() == [[k, 0] for k in range(len(lengths))]
    for k, parts in enumerate(lengths):
        padding = [total - sum(parts)] if sum(parts) < total else []
        documents = [number for number, n in enumerate(parts + padding) for _ in range(n)]
        positions = [i for n in parts + padding for i in range(n)]
        assert isolated.documents[k].tolist() == documents and isolated.positions[k].tolist() == positions
        assert isolated.first[k].tolist() == [position == 0 for position in positions]


def test_held_out_rows_are_spread_evenly(data):
    for rows in (1, 3, 10_000):
        found = data.held_out(rows)
        assert len(found) == sum(min(rows, len(source)) for source in data.validation)
        for source in data.validation:
            mine = [(row, i, total) for s, row, i, total in found if s is source]
            count = min(rows, len(source))
            assert mine == [(i * len(source) // count, i, count) for i in range(count)]
    assert data.held_out(0) == []


@pytest.mark.parametrize("weights", [{"short": 0.0, "long": 0.0}, {"short": 1.0, "long": -1.0}])
def test_weights_that_are_no_shares_are_refused(corpus_dir, weights):
    with pytest.raises(UserError, match="expected 0 or more for each source, and more for at least one"):
        TrainData(str(corpus_dir), seed=0, weights=weights)


def test_unknown_source(corpus_dir):
    with pytest.raises(UserError, match=r"data.weights names \['nope'\]; .* has \['long', 'short'\]"):
        TrainData(str(corpus_dir), seed=0, weights={"nope": 1.0})


def test_rows_that_repeat_come_in_succession(corpus_dir, data):
    pairs = TrainData(str(corpus_dir), seed=3, repeats=2)
    for n in range(40):
        assert pairs.locate(2 * n) == pairs.locate(2 * n + 1) == data.locate(n)


def test_what_was_consumed_is_what_was_drawn(corpus_dir):
    for repeats in (1, 2):
        data = TrainData(str(corpus_dir), seed=3, repeats=repeats)
        for count in (0, 2, 10, 126):
            rows = {n // repeats for n in range(count)}
            sources = [data.locate(n * repeats)[0] for n in rows]
            found = {name: sources.count(i) for i, name in enumerate(data.names)}
            assert data.consumed(count) == found
