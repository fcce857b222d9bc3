import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.packing import BestFit, Concat, PackedRows

documents = st.lists(st.integers(1, 40), min_size=1, max_size=12)  # their lengths


def texts_of(lengths: list[int]) -> list[np.ndarray]:
    """Documents in which every token is unique: 100 times the document's number, plus the position."""
    return [np.full(length, number) * 100 + np.arange(length) for number, length in enumerate(lengths)]


def pack(packer, texts: list[np.ndarray], take_after: list[bool], part: int = 1000) -> list[tuple]:
    """(ids, lengths, continues) of every row, taken at the given moments and at the end.

    Documents are added in parts of `part` tokens.
    """
    taken: list[PackedRows] = []
    for text, take in zip(texts, take_after):
        for begin in range(0, len(text), part):
            ids = text[begin : begin + part]
            packer.add(ids, np.array([len(ids)]), goes_on=begin + part < len(text))
            if take:
                taken.append(packer.take())
    taken.append(packer.take(last=True))
    return [
        row for rows in taken for row in zip(rows.ids, np.split(rows.lengths, np.cumsum(rows.counts)), rows.continues)
    ]


take_moments = st.lists(st.booleans(), min_size=12, max_size=12)
parts = st.integers(1, 20)


@given(documents, st.integers(2, 16), take_moments, parts, st.booleans())
def test_concat_rows_are_the_documents_in_order_with_their_boundaries(lengths, seq_len, take_after, part, pad_last):
    """No token is lost, moved or counted to another document, whenever rows are taken and documents come in parts."""
    texts, packer = texts_of(lengths), Concat(seq_len, padding_id=-1, pad_last=pad_last)
    rows = pack(packer, texts, take_after, part)
    everything = np.concatenate(texts)
    used = len(everything) if pad_last else len(everything) // seq_len * seq_len
    assert len(rows) == -(-used // seq_len) and packer.pending_tokens == len(everything) - used
    flat = np.concatenate([ids for ids, *_ in rows] or [everything[:0]])
    np.testing.assert_array_equal(flat[:used], everything[:used])
    assert (flat[used:] == -1).all()
    assert all(pieces.sum() == seq_len for _, pieces, _ in rows[: used // seq_len])
    # there is a boundary where a row or a document ends, and nowhere else
    ends = np.cumsum(lengths).tolist()
    found = set(np.cumsum(np.concatenate([pieces for _, pieces, _ in rows])).tolist()) if rows else set()
    assert found == {end for end in ends if end <= used} | set(range(seq_len, used + 1, seq_len))
    # and each row says whether a document ends at its end
    row_ends = [min(used, (number + 1) * seq_len) for number in range(len(rows))]
    assert [bool(continues) for *_, continues in rows] == [end not in ends for end in row_ends]


@given(documents, st.integers(2, 16), take_moments, parts)
def test_best_fit_places_a_document_in_parts_like_a_whole_one(lengths, seq_len, take_after, part):
    whole = pack(BestFit(seq_len), texts_of(lengths), [False] * 12)
    in_parts = pack(BestFit(seq_len), texts_of(lengths), take_after, part)
    assert [ids.tolist() for ids, *_ in whole] == [ids.tolist() for ids, *_ in in_parts]
    assert not any(continues for *_, continues in in_parts)


@given(documents, st.integers(2, 16), take_moments)
def test_best_fit_cuts_no_document_that_fits(lengths, seq_len, take_after):
    """Every token comes once; a longer document gives full rows and one last piece; padding is only at row ends."""
    texts, packer = texts_of(lengths), BestFit(seq_len, padding_id=-1)
    rows = pack(packer, texts, take_after)
    pieces = []
    for ids, row_lengths, _ in rows:
        assert len(row_lengths) and (row_lengths > 0).all()
        assert (ids[row_lengths.sum() :] == -1).all()
        pieces += np.split(ids[: row_lengths.sum()], np.cumsum(row_lengths)[:-1])
    expected = [text[i : i + seq_len] for text in texts for i in range(0, len(text), seq_len)]
    assert sorted(map(tuple, pieces)) == sorted(map(tuple, expected))
    assert packer.pending_tokens == 0


@given(st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_best_fit_leaves_at_most_one_row_half_empty(lengths):
    """With two such rows, the document that opened the later one would have fitted into the earlier one."""
    rows = pack(BestFit(16), texts_of(lengths), [False] * 60)
    assert sum(pieces.sum() <= 8 for _, pieces, _ in rows) <= 1


@pytest.mark.parametrize("packer", [Concat, BestFit])
def test_no_documents_give_no_rows(packer):
    rows = packer(8).take(last=True)
    assert rows.ids.shape == (0, 8) and len(rows) == 0
