import json

import numpy as np
import pytest
from helpers import SHARED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_prep import engines, tokenizing

unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
look_alikes = st.sampled_from(["<eos>", "<bos", " <eos> ", "def f(x):\n\treturn x\n", "\x04", "\r\n", "  ", "'s"])
documents = st.lists(st.lists(st.one_of(unicode, look_alikes), max_size=6).map("".join), max_size=6)


def rows(encoded: tokenizing.Encoded) -> list[list[int]]:
    ids, lengths = encoded
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(lengths) else []


@pytest.mark.parametrize("engine", ["tokenizers", pytest.param("gigatoken", marks=pytest.mark.slow)])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(documents)
def test_each_engine_gives_the_ids_of_encode(tokenizer, engine, texts):
    if engine == "gigatoken":
        pytest.importorskip("gigatoken", reason="gigatoken-cachefix is not installed")
    encoder, _ = engines.select_engine(tokenizing.spec_of(tokenizer), engine, [])
    assert rows(encoder.encode(texts)) == [tokenizer.encode(text, add_special_tokens=False) for text in texts]


@pytest.fixture(scope="session")
def lacking(tokenizer):
    """The tokenizer without tokens for three bytes. SmolLM2's lacks some too; `tokenizers` drops them silently."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for character in ("\u0104", "\u011d", "\u00f1"):  # bytes 0x04, 0x1d, 0xf1
        del state["model"]["vocab"][character]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.sampled_from(["th", "e", "\x04", "\x1d", "\U00040000", " the", "é", "\n"]), max_size=8).map("".join))
def test_bytes_without_a_token_are_dropped_as_the_reference_drops_them(lacking, text):
    pytest.importorskip("gigatoken", reason="gigatoken-cachefix is not installed")
    spec = tokenizing.spec_of(lacking)
    engine = engines.Gigatoken(spec)
    reference = tokenizing.Reference(spec)
    assert rows(engine.encode(["the", text, ""])) == rows(reference.encode(["the", text, ""]))


@pytest.mark.parametrize("engine", ["tokenizers", "gigatoken"])
def test_a_tokenizer_that_was_saved_with_truncation_and_padding_gives_all_ids_and_no_others(
    tokenizer_dir, tokenizer, engine
):
    """As one that was saved after a training with max_length: otherwise every document would end there."""
    if engine == "gigatoken":
        pytest.importorskip("gigatoken", reason="gigatoken-cachefix is not installed")
    saved = tokenizing.load_tokenizer(str(tokenizer_dir))
    saved.backend_tokenizer.enable_truncation(5)
    saved.backend_tokenizer.enable_padding(length=9)
    texts = ["the", "a longer text of some more words " * 3]
    spec = tokenizing.spec_of(saved)
    encoder = engines.Gigatoken(spec) if engine == "gigatoken" else tokenizing.Reference(spec)
    assert rows(encoder.encode(texts)) == [tokenizer.encode(text, add_special_tokens=False) for text in texts]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the real GPT-2 and LLaMA-2 tokenizers are not in ../shared")
@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_the_selected_engine_gives_the_ids_of_the_real_tokenizers(name, tales):
    tokenizer = tokenizing.load_tokenizer(str(SHARED / "data" / "tokenizers" / name))
    spec = tokenizing.spec_of(tokenizer)
    engine, why = engines.select_engine(spec, "auto", tales[:50])
    texts = [*tales[::10], "\n\n".join(tales), *tokenizing.adversarial_texts(spec, 200)]  # a long document among them
    assert rows(engine.encode(texts)) == [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        assert engine.name == "tokenizers" and "not installed" in why
    else:
        assert engine.name == "gigatoken"


@pytest.mark.parametrize("mode", ["text", "special"])
def test_a_tokenizer_that_has_no_fast_form_gives_its_own_ids(tmp_path, mode):
    """Special tokens in a text are what was asked for, as with a fast one."""
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = tokenizing.load_tokenizer(str(tmp_path))
    assert not tokenizer.is_fast
    texts = ["naïve 本", "", "one </s> two"]
    spec = tokenizing.spec_of(tokenizer, str(tmp_path), special_in_text=mode)
    engine, _ = engines.select_engine(spec, "auto", texts)
    found = rows(engine.encode(texts))
    split = mode == "text"
    assert found == [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split) for text in texts]
    assert (tokenizer.eos_token_id in found[2]) != split


def test_an_engine_with_other_ids_is_not_selected(tokenizer, monkeypatch):
    class Wrong(tokenizing.Reference):
        name, version = "gigatoken", "0"

        def __init__(self, spec, parallel):
            super().__init__(spec)
            self.reference = tokenizing.Reference(spec)

        def encode(self, texts):
            ids, lengths = super().encode(texts)
            return np.where(ids == 50, 51, ids), lengths

    monkeypatch.setattr(engines, "Gigatoken", Wrong)
    spec = tokenizing.spec_of(tokenizer)
    engine, why = engines.select_engine(spec, "auto", ["plain text"])
    assert engine.name == "tokenizers" and "gigatoken is not used: its ids differ" in why
    with pytest.raises(UserError, match=r"engine is gigatoken, but its ids differ from those of tokenizers on"):
        engines.select_engine(spec, "gigatoken", [])


def test_an_engine_that_is_wrong_on_this_corpus_alone_is_not_selected(tokenizer, monkeypatch):
    class Wrong(tokenizing.Reference):
        name, version = "gigatoken", "0"

        def __init__(self, spec, parallel):
            super().__init__(spec)
            self.reference = tokenizing.Reference(spec)

        def encode(self, texts):
            return super().encode([text.replace("quartz", "Quartz") for text in texts])

    monkeypatch.setattr(engines, "Gigatoken", Wrong)
    spec = tokenizing.spec_of(tokenizer)
    assert engines.select_engine(spec, "auto", ["plain text"])[0].name == "gigatoken"
    engine, why = engines.select_engine(spec, "auto", ["plain text", "of quartz"])
    assert engine.name == "tokenizers" and "its ids differ from those of tokenizers on 'of quartz'" in why


def test_the_fingerprint_changes_exactly_with_what_decides_ids(tokenizer_dir):
    def changed(change) -> str:
        tokenizer = tokenizing.load_tokenizer(str(tokenizer_dir))
        change(tokenizer)
        return tokenizing.fingerprint(tokenizer)

    plain = changed(lambda t: None)
    assert plain == changed(lambda t: t("x", max_length=9, truncation=True))
    assert plain == changed(lambda t: t.add_special_tokens({"mask_token": "<|mask|>"}))
    assert plain != changed(lambda t: t.add_tokens(["hello"]))
