"""Long texts are cut only where the pre-tokenizer, or the lack of one, lets no token reach across."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import PreTrainedTokenizerFast

from data_prep import cutting, tokenizing

SENTENCES = "今天天气很好。我们去公园，我们看书。我的书很好，但是我不看！"
# As Llama 3 and Qwen split: a sign belongs to the letters after it, so that "。我们" may be one token
SIGN_WITH_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def spec_of(kind: str) -> tokenizing.TokenizerSpec:
    """A byte-level BPE that splits as GPT-2 or Llama 3, or one of characters that splits nothing, as Gemma."""
    backend = Tokenizer(models.BPE())
    if kind == "gpt2":
        backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    elif kind == "llama3":
        parts = [Split(Regex(SIGN_WITH_LETTERS), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
        backend.pre_tokenizer = Sequence(parts)
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    alphabet = [] if kind == "unsplit" else ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([SENTENCES] * 50, trainer)
    return tokenizing.spec_of(PreTrainedTokenizerFast(tokenizer_object=backend))


def same_ids(spec: tokenizing.TokenizerSpec, pattern: re.Pattern | None) -> bool:
    reference = tokenizing.Reference(spec)
    text = SENTENCES * 20
    parts = list(cutting.cut_text(iter([text]), pattern, 10))
    assert "".join(parts) == text
    return reference.encode(parts)[0].tolist() == reference.encode([text])[0].tolist()


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_cjk_text_is_cut_at_its_punctuation_with_the_ids_of_the_whole(kind):
    spec = spec_of(kind)
    pattern = cutting.find_cut_pattern(spec)
    assert len(list(cutting.cut_text(iter([SENTENCES * 20]), pattern, 10))) > 20
    assert same_ids(spec, pattern)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [("llama3", r"(?<=[。！？、，])(?=[一-龥])"), ("unsplit", r"(?<=[一-龥])(?=[。！？、，])")],
    ids=["after a sign", "no pre-tokenizer"],
)
def test_a_pattern_that_would_cut_a_token_is_not_taken(kind, wrong, monkeypatch):
    spec = spec_of(kind)
    pattern = re.compile(wrong)
    assert not same_ids(spec, pattern)
    monkeypatch.setattr(cutting, "CUT_PATTERNS", (pattern,))
    assert cutting.find_cut_pattern(spec) is None


PIECES = st.lists(st.sampled_from(["a", "word" * 5, " ", "本" * 30, "。", "x\n", "-" * 9]), min_size=1, max_size=40)


@given(PIECES.map("".join), st.sampled_from(cutting.CUT_PATTERNS), st.integers(2, 300), st.integers(5, 80))
def test_a_part_that_is_too_long_is_seen_wherever_it_is(text, pattern, block, limit):
    """At a text's begin, in its middle and at its end, within a block and over many; give or take two characters."""
    ends = [match.end() for match in pattern.finditer(text)]
    longest = max(b - a for a, b in pairwise([0, *ends, len(text)]))
    found = cutting.has_longer_part((text[i : i + block] for i in range(0, len(text), block)), pattern, limit)
    if abs(longest - limit) > 2:
        assert found == (longest > limit)
