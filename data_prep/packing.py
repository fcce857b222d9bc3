"""Token ids of documents into rows of exactly `seq_len` tokens, document boundaries kept.

In: batches of documents, as their ids end to end and their lengths. Out: `PackedRows`, which also have
the lengths of the pieces of documents in each row, so that attention can be isolated per document.

`concat` cuts documents at row ends and goes on in the next row, as the DiffuLLaMA reference does; the
tokens that fill no row at the end are dropped. `best_fit` keeps every document that fits a row whole and
cuts longer ones at row ends; the end of a row may be padding, and no token is dropped.
"""

from dataclasses import dataclass

import numpy as np

WINDOW_TOKENS = 1 << 22  # best_fit collects this many tokens of documents, then sorts and places them
OPEN_ROWS = 1024  # unfilled rows that best_fit keeps for the next window


@dataclass
class PackedRows:
    """Rows with the lengths of the pieces of documents in them."""

    ids: np.ndarray  # (rows, seq_len)
    lengths: np.ndarray  # (pieces,) of all rows, row after row
    counts: np.ndarray  # (rows,) pieces in each row

    def __len__(self) -> int:
        return len(self.counts)

    def split(self, at: int) -> tuple["PackedRows", "PackedRows"]:
        """The first `at` rows, and the others."""
        piece = int(self.counts[:at].sum())
        return (
            PackedRows(self.ids[:at], self.lengths[:piece], self.counts[:at]),
            PackedRows(self.ids[at:], self.lengths[piece:], self.counts[at:]),
        )


class Concat:
    """Documents end to end.

    >>> packer = Concat(seq_len=4)
    >>> packer.add(np.arange(9), np.array([6, 3]))
    >>> rows = packer.take(); rows.lengths.tolist(), rows.counts.tolist(), packer.pending_tokens
    ([4, 2, 2], [1, 2], 1)
    """

    def __init__(self, seq_len: int, padding_id: int = 0):
        self.seq_len = seq_len
        self._ids: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self.pending_tokens = 0  # added and not yet taken

    @property
    def free_tokens(self) -> int:
        """Tokens still free in the current row.

        A long document may be added in parts that end where a row does: the rows are those of the whole document.
        """
        return self.seq_len - self.pending_tokens % self.seq_len

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        self._ids.append(ids)
        self._lengths.append(lengths)
        self.pending_tokens += len(ids)

    def take(self, last: bool = False) -> PackedRows:
        """All full rows so far; after `last`, the tokens that are still pending are dropped."""
        rows = self.pending_tokens // self.seq_len
        used = rows * self.seq_len
        ids = np.concatenate(self._ids) if self._ids else np.zeros(0, dtype=np.int64)
        ends = np.cumsum(np.concatenate(self._lengths)) if self._lengths else np.zeros(0, dtype=np.int64)
        cuts = np.union1d(ends[ends <= used], np.arange(1, rows + 1) * self.seq_len)
        counts = np.bincount((cuts - 1) // self.seq_len, minlength=rows) if rows else np.zeros(0, dtype=np.int64)
        self._ids = [ids[used:]]
        self.pending_tokens = len(ids) - used
        self._lengths = [np.diff(ends[ends > used], prepend=used)]
        return PackedRows(ids[:used].reshape(rows, self.seq_len), np.diff(cuts, prepend=0), counts)


class BestFit:
    """Best-fit decreasing over windows of documents: the longest first, each into the fullest row that takes it."""

    def __init__(self, seq_len: int, padding_id: int = 0):
        self.seq_len = seq_len
        self.padding_id = padding_id
        self.pending_tokens = 0  # added and not yet taken; none after take(last=True)
        self._pieces: list[np.ndarray] = []  # documents, or their last parts, that wait to be placed
        self._waiting_tokens = 0  # in them
        self._full: list[list[np.ndarray]] = []  # finished rows, each a list of pieces
        self._open: list[list[np.ndarray]] = []  # rows with space left

    @property
    def free_tokens(self) -> int:
        """As Concat's. Here a document longer than a row always begins with a row of its own."""
        return self.seq_len

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        for document in np.split(ids, np.cumsum(lengths)[:-1]):
            whole = len(document) // self.seq_len * self.seq_len
            self._full += [[row] for row in document[:whole].reshape(-1, self.seq_len)]
            if whole < len(document):
                self._pieces.append(document[whole:])
                self._waiting_tokens += len(document) - whole
        self.pending_tokens += len(ids)
        if self._waiting_tokens >= WINDOW_TOKENS:
            self._fit()

    def _fit(self) -> None:
        """Place the waiting pieces."""
        free: dict[int, list[list[np.ndarray]]] = {}  # open rows by how many tokens still fit
        spaces = 0  # bit n is set when some open row has space for exactly n tokens
        for row in self._open:
            space = self.seq_len - sum(map(len, row))
            free.setdefault(space, []).append(row)
            spaces |= 1 << space
        for piece in sorted(self._pieces, key=len, reverse=True):
            size = len(piece)
            fitting = spaces >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1  # the lowest set bit: the smallest that is enough
                row = free[space].pop()
                if not free[space]:
                    spaces ^= 1 << space
            else:
                space = self.seq_len
                row = []
            row.append(piece)
            if space == size:
                self._full.append(row)
            else:
                free.setdefault(space - size, []).append(row)
                spaces |= 1 << (space - size)
        by_space = [row for space in sorted(free) for row in free[space]]  # the fullest first
        surplus = max(0, len(by_space) - OPEN_ROWS)
        self._full += by_space[:surplus]
        self._open = by_space[surplus:]
        self._pieces = []
        self._waiting_tokens = 0

    def take(self, last: bool = False) -> PackedRows:
        """Finished rows so far; with `last`, all rows, padded where they are not full."""
        if last:
            self._fit()
            self._full += self._open
            self._open = []
        rows = self._full
        self._full = []
        ids = np.full((len(rows), self.seq_len), self.padding_id, dtype=np.int64)
        for target, row in zip(ids, rows):
            start = 0
            for piece in row:
                target[start : start + len(piece)] = piece
                start += len(piece)
        lengths = np.array([len(piece) for row in rows for piece in row], dtype=np.int64)
        self.pending_tokens -= int(lengths.sum())
        return PackedRows(ids, lengths, np.array([len(row) for row in rows], dtype=np.int64))


PACKERS = {"concat": Concat, "best_fit": BestFit}
