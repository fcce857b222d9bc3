import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_prep.packing import Packer

documents = st.lists(st.integers(1, 40), min_size=1, max_size=12)  # their lengths


@given(documents, st.integers(2, 16), st.data())
def test_rows_are_the_documents_in_order_with_their_boundaries(lengths, seq_len, data):
    """Whatever the moments at which rows are taken: no token lost, moved or put under another document."""
    texts = [np.full(length, number) * 100 + np.arange(length) for number, length in enumerate(lengths)]
    packer, rows, pieces = Packer(seq_len), [], []
    for text in texts:
        packer.add(text)
        if data.draw(st.booleans()):
            ids, row_lengths = packer.take()
            rows.append(ids)
            pieces += row_lengths
    ids, row_lengths = packer.take()
    rows.append(ids)
    pieces += row_lengths

    flat, everything = np.concatenate(rows).ravel(), np.concatenate(texts)
    used = len(everything) // seq_len * seq_len
    assert packer.remainder == len(everything) - used
    np.testing.assert_array_equal(flat, everything[:used])
    assert all(piece.sum() == seq_len for piece in pieces)
    # a boundary stands where a row or a document ends, and nowhere else
    found = set(np.cumsum(np.concatenate(pieces)).tolist()) if pieces else set()
    expected = {end for end in np.cumsum(lengths) if end <= used} | set(range(seq_len, used + 1, seq_len))
    assert found == expected


def test_no_documents_no_rows():
    ids, lengths = Packer(8).take()
    assert ids.shape == (0, 8) and lengths == []
