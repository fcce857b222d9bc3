"""Where a long text may be cut into parts that are tokenized one by one."""

import json
import random
import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from .tokenizing import Reference, TokenizerSpec, adversarial_texts, byte_characters

# Places where a long text may be cut into parts that are tokenized one by one: the ids of the parts, end to
# end, must be the ids of the whole. The matched characters themselves are dropped.
CUT_PATTERNS = (
    # GPT-2's and its successors' pre-tokenizers: a word begins with its space, a lone newline ends a chunk, and so
    # does a letter that punctuation follows; Llama 3's and Qwen's join punctuation with the letter after it
    re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\S\n)(?=[^\W\d_])|(?<=[一-龥ぁ-ゖァ-ヺ가-힣])(?=[。！？、，])"),
    # LLaMA-2's tokenizer puts a space before every text, so the space of the cut is dropped
    re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])"),
)


def find_cut_pattern(spec: TokenizerSpec) -> re.Pattern | None:
    """The first of CUT_PATTERNS that keeps the ids of adversarial texts, cut wherever it matches; None if none does."""
    reference = Reference(spec)
    rng = random.Random(0)
    strings = adversarial_texts(spec, 600)
    words = ["aZ", "the", "I", "xyz", "tion", "été", "本", "カ", "한", "."]
    between = " \n。！？、，"
    texts = [
        "".join(
            rng.choice(strings)[:200] + rng.choice(words) + rng.choice(between) + rng.choice(words) for _ in range(4)
        )
        for _ in range(800)
    ]
    texts += [first + sign + second for first in words for sign in between for second in words]
    added = [token["content"] for token in json.loads(spec.state)["added_tokens"]] if spec.state else []
    tokens = _token_texts(spec)
    for pattern in CUT_PATTERNS:
        # Ids can change at a cut only where a token reaches across one
        texts_of_tokens = [
            before + token + "a" for token in tokens if pattern.search(token) for before in ("a", " ", "本")
        ]
        parts = [part for text in texts + texts_of_tokens for part in cut_text(iter([text]), pattern, 1)]
        whole, _ = reference.encode(texts + texts_of_tokens)
        cuts_a_token = any(pattern.search(token) for token in added)
        if not cuts_a_token and np.array_equal(whole, reference.encode(parts)[0]):
            return pattern
    return None


def _token_texts(spec: TokenizerSpec) -> list[str]:
    """What the tokens of the vocabulary write, as far as they are whole characters; none for a slow tokenizer."""
    if not spec.state:
        return []
    vocabulary = json.loads(spec.state)["model"]["vocab"]  # of Unigram: pairs of token and score
    byte_of = {character: byte for byte, character in byte_characters().items()}
    found = []
    for token in (token if isinstance(token, str) else token[0] for token in vocabulary):
        found.append(token.replace("▁", " "))
        if all(character in byte_of for character in token):
            found.append(bytes(byte_of[character] for character in token).decode(errors="ignore"))
    return found


def has_longer_part(blocks: Iterator[str], pattern: re.Pattern | None, limit: int) -> bool:
    """Whether a text has more than `limit` characters without a place to cut it."""
    run = 0  # characters since the last such place
    last = ""
    for block in blocks:
        found = [match.end() for match in pattern.finditer(last + block)] if pattern else []
        edges = [0, *(max(0, end - len(last)) for end in found), len(block)]
        gaps = [b - a for a, b in pairwise(edges)]
        if run + gaps[0] > limit or max(gaps) > limit:
            return True
        run = gaps[-1] if found else run + len(block)
        last = block[-2:]
    return False


def cut_text(blocks: Iterator[str], pattern: re.Pattern | None, size: int) -> Iterator[str]:
    """The text of `blocks` in parts of at least `size` characters, each cut at the next match of `pattern`.

    Without a pattern the text comes as one part.
    """
    rest = ""
    searched = size  # there is no match before this position of `rest`
    for block in blocks:
        rest += block
        while pattern is not None and (found := pattern.search(rest, searched)):
            yield rest[: found.start()]
            rest = rest[found.end() :]
            searched = size
        searched = max(size, len(rest) - 2)
    if rest:
        yield rest
