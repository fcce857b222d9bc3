"""Several corpora in one run: whose rows come how often, by which names, and what does not go together."""

import json
import shutil
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest
from helpers import config as corpus_config
from helpers import write_jsonl
from made_up_corpora import made_up

from common.config import load_config, save_config
from common.errors import UserError
from data_prep.prepare import prepare
from data_prep.shards import Manifest, ShardedRows
from pretrain import adapt
from pretrain.config import DataConfig, ModelConfig, RunConfig
from pretrain.corpora import load_corpora, shown
from pretrain.data import TrainData
from pretrain.launch import check_corpus
from tools.card import _data as on_card


@pytest.fixture
def two(tmp_path) -> tuple[str, str]:
    """Corpora web, with two sources, and code."""
    web = made_up(tmp_path / "web", {"news": 30, "books": 20}, {"news": 3.0, "books": 1.0})
    return web, made_up(tmp_path / "code", {"python": 40}, {"python": 2.0})


def shares(data: TrainData, rows: int = 1000) -> dict[str, Fraction]:
    return {name: Fraction(count, rows) for name, count in data.consumed(rows).items()}


def test_in_a_list_each_source_has_its_own_weight(two):
    data = TrainData(list(two), 0)
    assert data.names == ["news", "books", "python"]
    assert shares(data, 600) == {"news": Fraction(1, 2), "books": Fraction(1, 6), "python": Fraction(1, 3)}


def test_in_a_mapping_the_sources_divide_what_their_corpus_has(two, tmp_path):
    web, code = two
    for scale in (1, 10):
        data = TrainData({web: 0.7 * scale, code: 0.3 * scale}, 0)
        assert shares(data) == {"news": Fraction(525, 1000), "books": Fraction(175, 1000), "python": Fraction(3, 10)}
    thirds = made_up(tmp_path / "thirds", {"a": 10, "b": 10, "c": 10})
    data = TrainData({thirds: 0.1, code: 0.9}, 0)  # 1/30 is no decimal, and exact all the same
    assert shares(data, 30) == {**dict.fromkeys("abc", Fraction(1, 30)), "python": Fraction(27, 30)}
    assert TrainData({web: 1, code: 0}, 0).names == ["news", "books"]


def test_weights_by_source_go_before_those_of_the_corpora(two):
    web, code = two
    for path in ([web, code], {web: 0.7, code: 0.3}):
        data = TrainData(path, 0, weights={"python": 3.0, "news": 1.0})
        assert shares(data) == {"python": Fraction(3, 4), "news": Fraction(1, 4)}
    with pytest.raises(UserError, match=r"data.weights names \['web'\]; .*/web, .*/code has \['books', 'news', 'py"):
        TrainData([web, code], 0, weights={"web": 1.0})


def test_a_period_that_is_too_long_is_refused(two, tmp_path):
    web, _ = two
    odd = made_up(tmp_path / "odd", {"a": 9, "b": 9}, {"a": 123.4567, "b": 7654.321})
    with pytest.raises(UserError, match=r"repeat only after \d+ samples; write them with .* data\.weights"):
        TrainData({web: 0.7, odd: 0.3}, 0)


def test_sources_of_the_same_name_are_called_by_their_corpus_too(tmp_path):
    folders = [made_up(tmp_path / name, {"text": 9, name: 9}) for name in ("a", "b")]
    data = TrainData(folders, 0, weights={"b/text": 1.0, "a/text": 1.0, "b": 1.0}, max_epochs={"b/text": 1})
    assert data.names == ["b/text", "a/text", "b"]
    assert data.consumed(1000)["b/text"] == 9
    assert list(load_corpora(folders).sources) == ["a/text", "a", "b/text", "b"]
    with pytest.raises(UserError, match=r"data.weights names \['text'\]; .* has \['a', 'a/text', 'b', 'b/text'\]"):
        TrainData(folders, 0, weights={"text": 1.0})


def test_sources_that_no_name_tells_apart_are_refused(tmp_path):
    one, other = (made_up(tmp_path / name / "shards", {"text": 9}) for name in ("a", "b"))
    with pytest.raises(UserError, match=f"{one} and {other} both have a source text, .*; rename or move one of"):
        TrainData([one, other], 0)
    with pytest.raises(UserError, match=f"data.path names {one} twice"):
        TrainData([one, one], 0)
    with pytest.raises(UserError, match="both have a source text"):
        TrainData([one, one + "/"], 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 64}, r"has rows of 32 tokens, but .*/other of 64; .*python -m data_prep rechunk"),
        ({"fingerprint": "0" * 64, "name": "u"}, r"fingerprint: t f{12}… and u 0{12}…; prepare one of them again"),
        ({"add_eos": False}, "add_eos: True and False"),
        ({"add_bos": True}, "add_bos: False and True"),
        ({"special_ids": {"bos": 1, "eos": 5, "pad": None}}, r"special_ids: \{.*'eos': 0.*\} and \{.*'eos': 5"),
    ],
)
def test_corpora_whose_rows_mean_different_things_are_refused(two, tmp_path, settings, message):
    other = made_up(tmp_path / "other", {"x": 9}, **settings)
    with pytest.raises(UserError, match=message) as error:
        load_corpora([*two, other])
    assert str(error.value).startswith(two[0]) and other in str(error.value)


def test_corpora_whose_documents_end_otherwise_are_refused(tmp_path):
    folders = [made_up(tmp_path / str(id_), {f"s{id_}": 9}, separator=id_) for id_ in (0, 5)]
    with pytest.raises(UserError, match="separator: 0 and 5; prepare one of them again"):
        load_corpora(folders)


def test_a_tokenizer_may_have_another_name_and_engine_and_the_larger_size_counts(two, tmp_path):
    other = made_up(tmp_path / "other", {"x": 9}, name="u", engine="gigatoken", vocab_size=390)
    corpora = load_corpora([*two, other])
    assert corpora.tokenizer["vocab_size"] == 390 and corpora.tokenizer["name"] == "t"


def test_the_fingerprint_follows_contents_order_weights_and_limits_and_not_the_place(two, tmp_path):
    web, code = two
    one = Manifest.load(web).fingerprint
    assert all(load_corpora(path).fingerprint == one for path in (web, [web], {web: 0.3}))  # as old runs have it
    paths = [[web, code], [code, web], {web: 0.7, code: 0.3}, {web: 0.6, code: 0.4}]
    found = [load_corpora(path).fingerprint for path in paths]
    assert len({*found, one}) == 5
    assert load_corpora({web: 7, code: 3}).fingerprint == found[2]
    moved = [shutil.copytree(folder, tmp_path / "moved" / name) for folder, name in ((web, "w"), (code, "c"))]
    assert load_corpora([str(folder) for folder in moved]).fingerprint == found[0]
    limited = made_up(tmp_path / "limited", {"news": 30, "books": 20}, {"news": 3.0, "books": 1.0}, {"books": 1})
    assert load_corpora(limited).fingerprint != one
    rows = made_up(tmp_path / "rows", {"python": 40}, {"python": 2.0}, {"python": 3})
    assert load_corpora([web, rows]).fingerprint != found[0]


@pytest.fixture(scope="module")
def second(tmp_path_factory, tokenizer_dir, tales):
    """Another corpus beside corpus_dir, of rows of the same length."""
    folder = tmp_path_factory.mktemp("second")
    prepare(corpus_config(folder, tokenizer_dir, [write_jsonl(folder / "s.jsonl", tales[100:140])], seq_len=32), False)
    return folder / "out"


def test_rows_are_read_from_their_own_corpus(corpus_dir, second):
    data = TrainData({str(corpus_dir): 1, str(second): 1}, 3)
    assert data.names == ["short", "long", "s"]
    entries = [(corpus_dir, entry) for entry in Manifest.load(corpus_dir).sources]
    entries += [(second, entry) for entry in Manifest.load(second).sources]
    for rows, held_out, (folder, entry) in zip(data.train, data.validation, entries, strict=True):
        for found, shards in ((rows, entry.train), (held_out, entry.validation)):
            expected = ShardedRows(folder, shards)
            assert len(found) == len(expected) > 0
            np.testing.assert_array_equal(found.row(len(found) - 1)[0], expected.row(len(found) - 1)[0])
    assert {data.names[data.validation.index(source)] for source, *_ in data.held_out(2)} == {"short", "long", "s"}


def test_all_corpora_are_checked(corpus_dir, second, base_dir, tmp_path):
    model = ModelConfig(base=str(base_dir("llama")))
    tokenizer = adapt.load_tokenizer(model)
    config = RunConfig(model=model, data=DataConfig(path=[str(corpus_dir), str(second)]))
    corpora = check_corpus(config, tokenizer)
    assert list(corpora.sources) == ["short", "long", "s"] and corpora.seq_len == 32
    config.train.seq_len = 64
    with pytest.raises(UserError, match=f"{corpus_dir}, {second} has rows of 32 tokens, but train.seq_len is 64"):
        check_corpus(config, tokenizer)
    config.train.seq_len = None
    broken = shutil.copytree(second, tmp_path / "broken")
    file = broken / Manifest.load(broken).sources[0].train[0].file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    config.data.path = {str(corpus_dir): 0.5, str(broken): 0.5}
    with pytest.raises(UserError, match=f"{file}: .*altered"):
        check_corpus(config, tokenizer)
    config.data.verify = "size"
    check_corpus(config, tokenizer)


@pytest.mark.parametrize(
    ("text", "expected", "words"),
    [
        ("data/web", "data/web", "data/web"),
        ("[data/web, data/code]", ["data/web", "data/code"], "data/web, data/code"),
        ("{data/web: 0.7, ./v1.2: 3}", {"data/web": 0.7, "./v1.2": 3}, "data/web (0.7), ./v1.2 (3)"),
    ],
)
def test_a_path_is_read_from_files_and_overrides_and_written_back(tmp_path, text, expected, words):
    (tmp_path / "new.yaml").write_text(f"data: {{path: {text}}}\n")
    assert load_config(RunConfig, tmp_path / "new.yaml").data.path == expected
    for before in ("data/demo", "[a]", "[a, b, c]", "{a: 1, b: 2}"):  # an override takes its place
        (tmp_path / "before.yaml").write_text(f"data: {{path: {before}}}\n")
        config = load_config(RunConfig, tmp_path / "before.yaml", [f"data.path={text}"])
        assert config.data.path == expected and shown(config.data.path) == words
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(RunConfig, tmp_path / "saved.yaml") == config
    assert json.loads(json.dumps(asdict(config)))["data"]["path"] == expected  # as wandb takes it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data.path is None, expected a folder, a list of folders, or a mapping of folders to weights"),
        ("[]", r"data.path is \[\], expected a folder, a list"),
        ("[[a], b]", r"data.path is \[\['a'\], 'b'\], expected a folder, a list"),
        ("{a: 1, b: x}", "data.path gives b the weight 'x', expected a number of 0 or more"),
        ("{a: -1}", "data.path gives a the weight -1, expected a number of 0 or more"),
        ("{a: .inf}", "data.path gives a the weight inf, expected a number of 0 or more"),
        ("{a: 0, b: 0}", r"data.path is .*a \(0\), .*b \(0\), expected a weight above 0 for at least one corpus"),
    ],
)
def test_a_path_that_is_none_is_refused(tmp_path, monkeypatch, text, message):
    for name in ("a", "b"):
        made_up(tmp_path / name, {name: 3})
    monkeypatch.chdir(tmp_path)
    config = load_config(RunConfig, None, [f"data.path={text}"])
    with pytest.raises(UserError, match=message):
        load_corpora(config.data.path)


def test_a_folder_may_be_called_by_a_number(tmp_path, monkeypatch):
    made_up(tmp_path / "2024", {"a": 3})
    monkeypatch.chdir(tmp_path)
    assert TrainData(load_config(RunConfig, None, ["data.path=2024"]).data.path, 0).names == ["a"]
    assert load_corpora({2024: 1}).sources["a"].folder == "2024"


def test_the_card_lists_every_corpus(two):
    web, code = two
    assert on_card(DataConfig(web)).splitlines() == [
        "| source of `web` | weight | rows of 32 tokens |",
        "| --- | --- | --- |",
        "| news | 3 | 30 |",
        "| books | 1 | 20 |",
    ]
    assert on_card(DataConfig({web: 0.6, code: 0.4})).splitlines()[::2] == [
        "| source | weight | rows of 32 tokens |",
        "| news of `web` | 0.45 | 30 |",
        "| python of `code` | 0.4 | 40 |",
    ]
    assert on_card(DataConfig([web, code], weights={"python": 5})).splitlines()[2:] == ["| python of `code` | 5 | 40 |"]
    assert on_card(DataConfig([web, code + "x"])) == "The corpora `web`, `codex`."
    assert on_card(DataConfig(code + "x")) == "The corpus `codex`."
