"""Engines give the reference's ids or are not used; special tokens in texts; the separator; large ids."""

import json
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers
import transformers
from helpers import SHARED, config, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_prep import cutting, engines, shards, tokenizing, unit_builder
from data_prep.prepare import prepare

NAMES = [
    "small",
    *(
        pytest.param(name, marks=pytest.mark.skipif(not SHARED.exists(), reason="no ../shared"))
        for name in ("gpt2", "llama2")
    ),
]
PIECES = st.one_of(st.text(max_size=8), st.sampled_from(["</s>", "<s>", "<|endoftext|>", "<eos>", "<bos>", " a", "\n"]))


@pytest.fixture
def named(tokenizer_dir):
    return lambda name: str(tokenizer_dir if name == "small" else SHARED / "data" / "tokenizers" / name)


def rows(encoded: tokenizing.Encoded) -> list[list[int]]:
    ids, lengths = encoded
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def test_the_table_of_unassigned_code_points_is_that_of_unicode_14():
    if unicodedata.unidata_version != "14.0.0":
        pytest.skip(f"Python {sys.version_info[:2]} has Unicode {unicodedata.unidata_version}")
    found = np.flatnonzero(engines.unassigned()).tolist()
    assert found == [p for p in range(0x110000) if unicodedata.category(chr(p)) == "Cn"]


def check_code_points(spec: tokenizing.TokenizerSpec, points: range, forms: list[str]) -> None:
    engine = engines.Gigatoken(spec)
    for form in forms:
        texts = [form.format(chr(p)) for p in points if not 0xD800 <= p < 0xE000]
        assert engines.first_difference(engine, engine.reference, texts) is None


@pytest.mark.parametrize("name", NAMES)
def test_letters_that_are_newer_than_the_fast_engine_have_the_references_ids(named, name):
    """A sample of all planes; extension J of CJK and the scripts of Unicode 15 to 17 are in it."""
    pytest.importorskip("gigatoken")
    spec = tokenizing.spec_of(tokenizing.load_tokenizer(named(name)))
    check_code_points(spec, range(0, 0x110000, 97), ["a{}b"])
    check_code_points(spec, range(0x323B0, 0x3347A, 50), ["a{}b", " {0}{0}"])


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the real tokenizers are not in ../shared")
def test_every_code_point_between_letters_has_the_references_ids(named):
    """Assigned and unassigned, in every plane that has letters."""
    pytest.importorskip("gigatoken")
    spec = tokenizing.spec_of(tokenizing.load_tokenizer(named("gpt2")))
    for start in [*range(0, 0x40000, 0x8000), 0xE0000]:  # planes 4 to 13 have nothing
        check_code_points(spec, range(start, start + 0x8000), ["a{}b"])


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_tokenizer_that_the_fast_engine_cannot_read_gets_the_reference(tmp_path, tales, kind):
    pytest.importorskip("gigatoken")
    if kind == "wordpiece":
        model = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"])
    else:
        model = tokenizers.Tokenizer(tokenizers.models.Unigram())
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["[UNK]", "[SEP]"], unk_token="[UNK]"
        )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.train_from_iterator(tales[:50], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="[SEP]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    spec = tokenizing.spec_of(tokenizer)
    engine, why = engines.select_engine(spec, "auto", tales[:5])
    assert rows(engine.encode(tales[:20])) == [tokenizer.encode(t, add_special_tokens=False) for t in tales[:20]]
    if engine.name == "tokenizers":
        assert why.startswith("gigatoken is not used: ")
        with pytest.raises(UserError, match="engine is gigatoken, but"):
            engines.select_engine(spec, "gigatoken", [])
    manifest = prepare(
        config(tmp_path, tmp_path / "tokenizer", [write_jsonl(tmp_path / "a.jsonl", tales[:20])]), progress=False
    )
    assert manifest and manifest.sources[0].documents == 20


@pytest.mark.parametrize(
    "failure", [RuntimeError("no such model"), type("PanicException", (BaseException,), {})("panic")]
)
def test_whatever_the_fast_engine_raises_the_reference_takes_its_place(tokenizer, monkeypatch, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr(engines, "Gigatoken", fail)
    engine, why = engines.select_engine(tokenizing.spec_of(tokenizer), "auto", [])
    assert engine.name == "tokenizers" and str(failure) in why


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ["tokenizers", "gigatoken"])
def test_special_tokens_in_a_text_are_text(named, name, engine):
    """The ids are those of transformers with split_special_tokens=True."""
    if engine == "gigatoken":
        pytest.importorskip("gigatoken")
    tokenizer = tokenizing.load_tokenizer(named(name))
    spec = tokenizing.spec_of(tokenizer, special_in_text="text")
    found = tokenizing.Reference(spec) if engine == "tokenizers" else engines.Gigatoken(spec)
    special = {tokenizer.get_vocab()[token] for token in spec.special_tokens}

    @settings(deadline=None, max_examples=60)
    @given(st.lists(PIECES, max_size=6).map("".join))
    def check(text):
        (ids,) = rows(found.encode([text]))
        assert ids == tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if name != "llama2":  # whose unknown token stands for characters, too
            assert not special.intersection(ids)

    check()
    assert rows(found.encode(["".join(spec.special_tokens)]))[0]


@pytest.mark.parametrize("mode", ["text", "special"])
def test_documents_with_special_tokens_are_counted_and_have_no_boundary_inside(
    tmp_path, tokenizer_dir, tokenizer, mode
):
    eos, bos = tokenizer.eos_token, tokenizer.bos_token
    texts = [f"one {eos} two {eos}", f"three {bos}{eos} four", *["plain text of some words"] * 20]
    settings_ = config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", texts)],
                       validation_fraction=0, packing="best_fit", special_tokens_in_text=mode)  # fmt: skip
    manifest = prepare(settings_, progress=False)
    assert manifest and manifest.sources[0].special_tokens == {bos: 1, eos: 2}
    rows_ = shards.ShardedRows(tmp_path / "out", manifest.sources[0].train)
    ids = np.concatenate([rows_.row(i)[0][: rows_.row(i)[1].sum()] for i in range(len(rows_))])
    assert (ids == tokenizer.eos_token_id).sum() == 22 + (3 if mode == "special" else 0)
    assert sum(len(rows_.row(i)[1]) for i in range(len(rows_))) == 22


def test_special_tokens_may_be_an_error(tmp_path, tokenizer_dir, tokenizer, tales):
    texts = [*tales[:5], f"see {tokenizer.eos_token} here"]
    made = config(tmp_path, tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", texts)], special_tokens_in_text="error")
    with pytest.raises(UserError, match=r"is a special token, and .* begins 'see .*special_tokens_in_text=text"):
        prepare(made, progress=False)


def test_documents_end_with_the_separator(tmp_path, tokenizer_dir, tokenizer, tales):
    """And not with EOS; where it is no token, or nothing ends a document, that is an error."""
    path = write_jsonl(tmp_path / "a.jsonl", tales[:20])
    bos = tokenizer.bos_token
    manifest = prepare(config(tmp_path, tokenizer_dir, [path], separator=bos, validation_fraction=0), progress=False)
    assert manifest and manifest.tokenizer["separator"] == tokenizer.bos_token_id
    rows_ = shards.ShardedRows(tmp_path / "out", manifest.sources[0].train)
    ids = np.concatenate([rows_.row(i)[0] for i in range(len(rows_))])
    expected = [i for text in tales[:20] for i in [*tokenizer.encode(text, add_special_tokens=False), 1]]
    assert ids.tolist() == expected[: len(ids)]
    with pytest.raises(UserError, match=f"separator is 'nothing', which is no token of .*{bos}"):
        prepare(config(tmp_path / "b", tokenizer_dir, [path], separator="nothing"), progress=False)
    with pytest.raises(UserError, match="with add_eos=false nothing ends a document"):
        prepare(config(tmp_path / "c", tokenizer_dir, [path], separator=bos, add_eos=False), progress=False)


def test_ids_beyond_the_number_of_tokens_are_stored_as_they_are(tmp_path, tokenizer_dir):
    """A vocabulary with holes: 385 tokens, the largest id 70,001, which 16 bits do not hold."""
    folder = tmp_path / "holes"
    tokenizing.load_tokenizer(str(tokenizer_dir)).save_pretrained(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], largest = 70_001, len(vocabulary)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = tokenizing.load_tokenizer(str(folder))
    assert tokenizer.encode("a", add_special_tokens=False) == [70_001] and len(tokenizer) <= largest
    path = write_jsonl(tmp_path / "a.jsonl", ["a b c a"] * 100)
    manifest = prepare(config(tmp_path, folder, [path], validation_fraction=0), progress=False)
    assert manifest and manifest.dtype == "uint32" and manifest.tokenizer["vocab_size"] == 70_002
    ids, _ = shards.ShardedRows(tmp_path / "out", manifest.sources[0].train).row(0)
    assert ids[:5].tolist()[0] == 70_001


def test_documents_without_a_token_are_counted_and_give_none(tmp_path, tokenizer_dir):
    """Of bytes that the vocabulary lacks, as SmolLM2's does."""
    folder = tmp_path / "lacking"
    tokenizing.load_tokenizer(str(tokenizer_dir)).save_pretrained(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    del state["model"]["vocab"]["\u0104"]  # of the byte 0x04
    (folder / "tokenizer.json").write_text(json.dumps(state))
    texts = ["\x04", "plain text " * 30, "\x04\x04", "more text " * 30]
    made = config(tmp_path, folder, [write_jsonl(tmp_path / "a.jsonl", texts)], validation_fraction=0, add_bos=True,
                  packing="best_fit")  # fmt: skip
    manifest = prepare(made, progress=False)
    assert manifest and manifest.sources[0].filtered == {"no tokens": 2}
    assert manifest.sources[0].documents == len(texts) - 2  # each is counted once
    rows_ = shards.ShardedRows(tmp_path / "out", manifest.sources[0].train)
    ids = np.concatenate([rows_.row(i)[0][: rows_.row(i)[1].sum()] for i in range(len(rows_))])
    assert [(ids == special).sum() for special in (0, 1)] == [2, 2]  # EOS and BOS, around two documents


def test_text_without_spaces_is_cut_at_its_punctuation(tokenizer, monkeypatch, tmp_path, tokenizer_dir):
    """Where there is none, a document beyond the limit is bad, and nothing of it is in a row."""
    pattern = cutting.find_cut_pattern(tokenizing.spec_of(tokenizer))
    sentence = "吾輩は猫である。名前はまだ無い、どこで生れたか！"
    assert len(list(cutting.cut_text(iter([sentence * 50]), pattern, 100))) > 8
    assert not cutting.has_longer_part(iter([sentence * 50] * 3), pattern, 60)
    assert cutting.has_longer_part(iter(["本" * 40] * 3), pattern, 100)
    assert not cutting.has_longer_part(iter(["本" * 40] * 2), pattern, 100)
    monkeypatch.setattr(unit_builder, "LONG_CHARACTERS", 1_000)
    monkeypatch.setattr(unit_builder, "PARTS_A_DOCUMENT", 1 << 10)
    path = write_jsonl(tmp_path / "a.jsonl", ["本" * 20_000, sentence * 500, "plain text " * 50])
    made = config(tmp_path, tokenizer_dir, [path], max_document_mb=1, max_bad_fraction=0.5, num_workers=1)
    manifest = prepare(made, progress=False)
    assert manifest and manifest.sources[0].bad == {"no place to cut it": 1} and manifest.sources[0].documents == 2
