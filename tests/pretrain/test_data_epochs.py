"""The order of a run's rows, also where sources have a limit of epochs, against a simulation row by row."""

import hashlib
import json
import tempfile
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from independent import random_numbers
from made_up_corpora import made_up

from common.config import load_config
from common.errors import UserError
from pretrain.config import RunConfig
from pretrain.data import TrainData
from pretrain.main import main

ORDER = 1  # what a stream is for, as pretrain/data.py documents it
MASK = (1 << 64) - 1


def shuffled(index: int, size: int, seed: int, n: int) -> int:
    """The documented permutation: six Feistel rounds on an even number of bits, again while outside."""
    half = 1
    while 4**half < size:
        half += 1
    keys = [int(key) for key in random_numbers(seed, n, ORDER).integers(0, 1 << 63, size=6)]
    while True:
        high, low = divmod(index, 1 << half)
        for key in keys:
            mixed = (low * 0x9E3779B97F4A7C15 + key) & MASK
            mixed = (mixed ^ (mixed >> 32)) * 0xD6E8FEB86659FD93 & MASK
            mixed ^= mixed >> 32
            high, low = low, high ^ (mixed % (1 << half))
        index = (high << half) + low
        if index < size:
            return index


def next_source(shares: dict[int, Fraction], given: dict[int, int]) -> int:
    """Tijdeman: of the sources that may have one more, that whose share demands it first; the first of equals."""
    n = sum(given.values())
    slack = Fraction(1, max(2 * len(shares) - 2, 1))
    may = [k for k in shares if shares[k] * (n + 1) - given[k] >= slack]
    return min(may, key=lambda k: ((given[k] + 1 - slack) / shares[k], k))


def simulated(rows: list[int], weights: list[int], limits: list[int | None], seed: int, count: int) -> list[tuple]:
    """(source, epoch, row, its phase) of the first `count` rows, or of all: one by one, with no period and no jump."""
    drawn = [0] * len(rows)
    found, phase = [], -1
    active: list[int] = []
    while len(found) < count:
        now = [k for k in range(len(rows)) if limits[k] is None or drawn[k] < limits[k]]
        if not now:
            break
        if now != active:
            active, phase = now, phase + 1
            shares = {k: Fraction(weights[k], sum(weights[k] for k in active)) for k in active}
            here = dict.fromkeys(active, 0)
        source = next_source(shares, here)
        epoch, index = divmod(drawn[source], rows[source])
        row = shuffled(index, rows[source], seed, epoch * len(rows) + source)
        found.append((source, epoch, row, phase))
        here[source] += 1
        drawn[source] += 1
    return found


ONE = st.tuples(st.integers(1, 40), st.integers(1, 12), st.sampled_from([0, 0.5, 1, 1.25, 2, 3.7]))  # rows, weight, cap
SOURCES = st.lists(ONE, min_size=1, max_size=5).filter(lambda s: all(c == 0 or floor(c * r) for r, _, c in s))
ALL_LIMITED = SOURCES.map(lambda sources: [(r, w, c or 1) for r, w, c in sources])
names = [f"s{k}" for k in range(5)]


def order(sources: list[tuple], seed: int = 3, repeats: int = 1, by_run: bool = False) -> TrainData:
    """Of one corpus whose manifest has the limits, or `by_run` the run."""
    of = [dict(zip(names, values)) for values in zip(*sources)]
    with tempfile.TemporaryDirectory() as folder:
        path = made_up(Path(folder) / "c", of[0], of[1], {} if by_run else of[2])
        return TrainData(path, seed, None, repeats, of[2] if by_run else None)


def limits_of(sources: list[tuple]) -> list[int | None]:
    return [floor(Fraction(str(cap)) * rows) if cap else None for rows, _, cap in sources]


@given(SOURCES, st.integers(0, 99), st.sampled_from([1, 2]), st.booleans())
def test_the_order_is_that_of_a_simulation(sources, seed, repeats, by_run):
    data = order(sources, seed, repeats, by_run)
    rows, weights, _ = zip(*sources)
    expected = simulated(rows, weights, limits_of(sources), seed, count=300)
    assert [data.locate(repeats * n) for n in range(len(expected))] == [found[:3] for found in expected]
    assert [data.locate(repeats * n + repeats - 1) for n in range(len(expected))] == [found[:3] for found in expected]
    for count in range(0, len(expected) + 1, 7):
        taken = [source for source, *_ in expected[:count]]
        assert data.consumed(repeats * count) == {data.names[k]: taken.count(k) for k in range(len(sources))}
    if None in limits_of(sources):
        assert data.rows is None
    elif len(expected) < 300:
        assert data.rows == repeats * len(expected) == repeats * sum(limits_of(sources))
        assert list(data.consumed(data.rows).values()) == limits_of(sources)


@given(ALL_LIMITED)
def test_a_limited_source_gives_its_rows_so_often_and_no_more(sources):
    """In all floor(max_epochs × rows); each whole epoch every row once, and a part of one no row twice."""
    data = order(sources)
    seen: dict[int, dict[int, list[int]]] = {k: {} for k in range(len(sources))}
    for n in range(data.rows):
        source, epoch, row = data.locate(n)
        seen[source].setdefault(epoch, []).append(row)
    for k, (rows, _, cap) in enumerate(sources):
        epochs = seen[k]
        assert sum(map(len, epochs.values())) == floor(Fraction(str(cap)) * rows)
        assert len(epochs) <= ceil(cap) and sorted(epochs) == list(range(len(epochs)))
        assert all(len(set(shown)) == len(shown) for shown in epochs.values())
        assert all(sorted(epochs[e]) == list(range(rows)) for e in range(len(epochs) - 1))
    with pytest.raises(UserError, match=rf"row {data.rows:,} was asked for, but max_epochs leaves {data.rows:,} \(s0"):
        data.locate(data.rows)


@given(SOURCES.filter(lambda sources: len(sources) > 1))
def test_within_each_phase_every_prefix_keeps_the_shares_of_those_that_are_left(sources):
    data = order(sources)
    _, weights, _ = zip(*sources)
    limits = limits_of(sources)
    drawn, here, start, active = [0] * len(sources), [], 0, None
    for n in range(min(400, data.rows or 400)):
        now = [k for k, limit in enumerate(limits) if limit is None or drawn[k] < limit]
        if now != active:
            active, start, here = now, n, [0] * len(sources)
        source = data.locate(n)[0]
        assert source in active
        drawn[source] += 1
        here[source] += 1
        whole = sum(weights[k] for k in active)
        assert all(abs(here[k] - (n + 1 - start) * Fraction(weights[k], whole)) < 1 for k in active)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "a9948b9580549d2d"),
        ({"weights": {"code": 2.0, "web": 1.0, "tiny": 0.0}}, "03e00bb34e0de79e"),
        ({"repeats": 2}, "95ee89a606f53bea"),
        ({"max_epochs": {"web": 0}}, "a9948b9580549d2d"),
    ],
)
def test_without_a_limit_the_order_is_that_of_earlier_versions(tmp_path, settings, expected):
    """Written down from the version that knew neither several corpora nor limits."""
    rows, weights = {"web": 1000, "code": 37, "tiny": 1}, {"web": 0.693584, "code": 0.3, "tiny": 0.006416}
    path = made_up(tmp_path / "c", rows, weights)
    for given_path in (path, [path], {path: 0.3}):
        data = TrainData(given_path, 5, **settings)
        found = [data.locate(n) for n in (*range(3000), 10**6, 10**12)]
        consumed = [data.consumed(n) for n in (0, 1, 2, 999, 12345)]
        assert hashlib.sha256(json.dumps([found, consumed]).encode()).hexdigest()[:16] == expected


def test_the_run_goes_before_the_manifest(tmp_path):
    path = made_up(tmp_path / "c", {"web": 100, "code": 10}, max_epochs={"code": 2})
    assert TrainData(path, 0).consumed(1000) == {"web": 980, "code": 20}
    assert TrainData(path, 0, max_epochs={"code": 0.5}).consumed(1000) == {"web": 995, "code": 5}
    assert TrainData(path, 0, max_epochs={"code": 0}).consumed(1000) == {"web": 500, "code": 500}
    both = TrainData(path, 0, max_epochs={"web": 1})  # the manifest's limit of the other stays
    assert both.rows == 120 and both.consumed(120) == {"web": 100, "code": 20}


@pytest.mark.parametrize(("epochs", "rows"), [(0.29, 29), (1.15, 115), (2.3, 230), (0.299, 29)])
def test_a_limit_is_the_decimal_that_was_written(tmp_path, epochs, rows):
    """0.29 * 100 is 28.999999999999996 where numbers are binary."""
    assert TrainData(made_up(tmp_path / "c", {"web": 100}), 0, max_epochs={"web": epochs}).rows == rows


@pytest.mark.parametrize(
    ("max_epochs", "message"),
    [
        ({"cod": 1}, r"data.max_epochs names \['cod'\]; .*/c has \['code', 'web'\]"),
        ({"code": -1}, "max_epochs of source code is -1, expected 0 or more; 0 is no limit"),
        ({"code": float("nan")}, "max_epochs of source code is nan, expected 0 or more"),
        ({"code": 0.05}, "max_epochs of source code is 0.05, of 10 rows that is none; give it more, or leave it out"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(tmp_path, max_epochs, message):
    path = made_up(tmp_path / "c", {"web": 100, "code": 10})
    with pytest.raises(UserError, match=message):
        TrainData(path, 0, max_epochs=max_epochs)


def test_a_run_that_takes_more_rows_than_there_are_is_refused_before_it_trains(tmp_path):
    path = made_up(tmp_path / "c", {"web": 100, "code": 10}, max_epochs={"code": 2})
    settings = [f"data.path={path}", "data.max_epochs={web: 1.5}", "train.global_batch_size=8", "train.steps=21"]
    assert TrainData.of_run(load_config(RunConfig, None, settings), 1).rows == 170  # 21 × 8 = 168
    settings[-1] = "train.steps=22"
    message = (
        r"the run takes 22 steps × 8 rows = 176, but max_epochs leaves 170 \(web 150, as it has 100, code 20, as it "
        r"has 10\); set train.steps to at most 21, or raise data.max_epochs"
    )
    with pytest.raises(UserError, match=message):
        TrainData.of_run(load_config(RunConfig, None, settings), 1)
    twice = TrainData.of_run(load_config(RunConfig, None, settings), 2)  # each row twice
    assert twice.rows == 340
    ended = load_config(RunConfig, None, [*settings, f"train.tokens={21 * 8 * 32}"])
    assert TrainData.of_run(ended, 1).rows == 170
    all_of_them = load_config(RunConfig, None, [*settings, "train.global_batch_size=10", "train.steps=17"])
    assert TrainData.of_run(all_of_them, 1).rows == 170
    few = load_config(RunConfig, None, [*settings, "train.global_batch_size=200"])
    with pytest.raises(UserError, match=r"leaves 170 \(.*\); raise data.max_epochs$"):
        TrainData.of_run(few, 1)


def test_the_dry_run_tells_what_the_rows_are_and_refuses_too_few(tmp_path, capsys):
    path = made_up(tmp_path / "c", {"web": 100, "code": 10}, max_epochs={"code": 2})
    shape = "model.architecture={model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 32, vocab_size: 384}"
    (tmp_path / "run.yaml").write_text("train: {global_batch_size: 8, micro_batch_size: 8, steps: 15}\n")
    asked = ["--config", str(tmp_path / "run.yaml"), "--dry_run", shape]
    assert main([*asked, f"data.path={path}"]) == 0
    assert f"data           {path}: web 83.3%, 1.00 epochs, code 16.7%, 2.00 epochs\n" in capsys.readouterr().out
    assert main([*asked, f"data.path={path}", "data.max_epochs={web: 0.9}"]) == 2
    assert "the run takes 15 steps × 8 rows = 120, but max_epochs leaves 110" in capsys.readouterr().err
    pairs = "diffusion.time_sampling=complementary"  # each row twice
    assert main([*asked, f"data.path={path}", "data.max_epochs={web: 0.9}", pairs]) == 0
    assert main([*asked, f"data.path={path}", "train.seq_len=64"]) == 2
    assert "has rows of 32 tokens, but train.seq_len is 64" in capsys.readouterr().err
    assert main([*asked, f"data.path=[{path}, /nowhere]", "train.seq_len=32"]) == 0
    assert f"data           {path}, /nowhere: not here, so its rows are not counted\n" in capsys.readouterr().out
    assert main([*asked, f"data.path=[{path}, /nowhere]"]) == 2
    assert "/nowhere/manifest.json not found" in capsys.readouterr().err
