"""A folder with nothing but sentencepiece's tokenizer.model, as LLaMA-2 was first released."""

import numpy as np
import pytest
import sentencepiece
from helpers import config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import engines, shards, tokenizing
from data_prep.prepare import prepare


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tales):
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(tales).splitlines()),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}'
    )
    return folder


def test_ids_are_those_of_transformers_and_of_sentencepiece(model_dir, tales):
    own = sentencepiece.SentencePieceProcessor(model_file=str(model_dir / "tokenizer.model"))
    tokenizer = tokenizing.load_tokenizer(str(model_dir))
    spec = tokenizing.spec_of(tokenizer)
    engine, _ = engines.select_engine(spec, "auto", tales[:20])
    words = st.sampled_from(["the", " fox", "  ", "\n", "9", "é", "日本", "\t", "“I", "<unk", "def f(x):"])
    texts = st.lists(st.one_of(words, st.sampled_from(tales).map(lambda t: t[:300])), min_size=1).map("".join)

    @settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
    @given(texts)
    def check(text):
        found = engine.encode([text])[0].tolist()
        assert found == tokenizer.encode(text, add_special_tokens=False)
        if not text.startswith(" "):  # sentencepiece adds a second space there, transformers does not
            assert found == own.encode(text)

    check()


def test_a_corpus_holds_sentencepieces_ids_between_bos_and_eos(model_dir, tales, tmp_path):
    for i, tale in enumerate(tales[:20]):
        (tmp_path / f"{i:02d}.txt").write_text(tale)
    settings = config(tmp_path, model_dir, [tmp_path / "*.txt"], validation_fraction=0, add_bos=True)
    manifest = prepare(settings, progress=False)
    rows = shards.ShardedRows(tmp_path / "out", manifest.sources[0].train)
    found = np.concatenate([rows.row(i)[0] for i in range(len(rows))])
    own = sentencepiece.SentencePieceProcessor(model_file=str(model_dir / "tokenizer.model"))
    expected = np.concatenate([[1, *own.encode(tale), 2] for tale in tales[:20]])
    np.testing.assert_array_equal(found, expected[: len(found)])
