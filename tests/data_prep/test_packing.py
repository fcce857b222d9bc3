import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.packing import BestFit, Concat, PackedRows

documents = st.lists(st.integers(1, 40), min_size=1, max_size=12)  # their lengths


def texts_of(lengths: list[int]) -> list[np.ndarray]:
    """Documents in which every token is unique: 100 times the document's number, plus the position."""
    return [np.full(length, number) * 100 + np.arange(length) for number, length in enumerate(lengths)]


def pack(packer, texts: list[np.ndarray], take_after: list[bool]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, lengths) of every row, taken at the given moments and at the end."""
    taken: list[PackedRows] = []
    for text, take in zip(texts, take_after):
        packer.add(text, np.array([len(text)]))
        if take:
            taken.append(packer.take())
    taken.append(packer.take(last=True))
    return [
        (ids, lengths)
        for rows in taken
        for ids, lengths in zip(rows.ids, np.split(rows.lengths, np.cumsum(rows.counts)[:-1]))
    ]


take_moments = st.lists(st.booleans(), min_size=12, max_size=12)


@given(documents, st.integers(2, 16), take_moments)
def test_concat_rows_are_the_documents_in_order_with_their_boundaries(lengths, seq_len, take_after):
    """No token is lost, moved or counted to another document, whenever rows are taken."""
    texts, packer = texts_of(lengths), Concat(seq_len)
    rows = pack(packer, texts, take_after)
    everything = np.concatenate(texts)
    used = len(everything) // seq_len * seq_len
    assert packer.pending_tokens == len(everything) - used
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in rows] or [everything[:0]]), everything[:used])
    assert all(pieces.sum() == seq_len for _, pieces in rows)
    # there is a boundary where a row or a document ends, and nowhere else
    found = set(np.cumsum(np.concatenate([pieces for _, pieces in rows])).tolist()) if rows else set()
    assert found == {end for end in np.cumsum(lengths) if end <= used} | set(range(seq_len, used + 1, seq_len))


@given(documents, st.integers(2, 16), take_moments)
def test_best_fit_cuts_no_document_that_fits(lengths, seq_len, take_after):
    """Every token comes once; a longer document gives full rows and one last piece; padding is only at row ends."""
    texts, packer = texts_of(lengths), BestFit(seq_len, padding_id=-1)
    rows = pack(packer, texts, take_after)
    pieces = []
    for ids, row_lengths in rows:
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
    assert sum(pieces.sum() <= 8 for _, pieces in rows) <= 1


@pytest.mark.parametrize("packer", [Concat, BestFit])
def test_no_documents_give_no_rows(packer):
    rows = packer(8).take(last=True)
    assert rows.ids.shape == (0, 8) and len(rows) == 0
