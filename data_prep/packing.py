"""Token ids of documents into rows of exactly `seq_len` tokens, document boundaries kept.

`concat`, as the reference's: documents run on across rows. A row knows the lengths of the pieces of
documents in it, so that attention can be isolated per document. The last tokens that fill no row
stay in the packer and are counted.
"""

import numpy as np


class Packer:
    """Collects documents; gives out full rows.

    >>> packer = Packer(seq_len=4)
    >>> packer.add(np.arange(6)); packer.add(np.arange(3))
    >>> [lengths.tolist() for lengths in packer.take()[1]]
    [[4], [2, 2]]
    >>> packer.remainder
    1
    """

    def __init__(self, seq_len: int):
        self.seq_len = seq_len
        self._pieces: list[np.ndarray] = []
        self.remainder = 0  # tokens added and not yet given out

    def add(self, ids: np.ndarray) -> None:
        self._pieces.append(ids)
        self.remainder += len(ids)

    @property
    def full_rows(self) -> int:
        return self.remainder // self.seq_len

    def take(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """All full rows: ids (rows, seq_len) and, for each row, the lengths of its document pieces."""
        rows = self.full_rows
        used = rows * self.seq_len
        flat = np.concatenate(self._pieces) if self._pieces else np.zeros(0, dtype=np.int64)
        ends = np.cumsum([len(piece) for piece in self._pieces], dtype=np.int64)
        row_ends = np.arange(1, rows + 1, dtype=np.int64) * self.seq_len
        cuts = np.union1d(ends[ends <= used], row_ends)
        lengths = np.diff(cuts, prepend=0)
        row_of_piece = (cuts - 1) // self.seq_len
        per_row = np.split(lengths, np.searchsorted(row_of_piece, np.arange(1, rows))) if rows else []
        left = ends[ends > used] - used
        self._pieces = np.split(flat[used:], left[:-1]) if len(left) else []
        self.remainder = len(flat) - used
        return flat[:used].reshape(rows, self.seq_len), per_row
