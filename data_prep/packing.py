"""Token ids of documents into rows of exactly `seq_len` tokens, document boundaries kept.

In: batches of documents, ids end to end and their lengths. Out: `Rows`, which also say the lengths of
the pieces of documents in them, so that attention can be isolated per document.

`concat`, as the reference's: documents run on across rows; tokens that fill no row at the end are
left over. `best_fit`: no document that fits a row is cut, longer ones only where a row is full; what
is empty at a row's end is padding, and nothing is left over.
"""

from dataclasses import dataclass

import numpy as np

WINDOW_TOKENS = 1 << 22  # documents that best_fit sorts at once
OPEN_ROWS = 1024  # unfilled rows that best_fit keeps for the next window


@dataclass
class Rows:
    ids: np.ndarray  # (rows, seq_len)
    lengths: np.ndarray  # (pieces,) of all rows, row after row
    counts: np.ndarray  # (rows,) pieces in each row

    def __len__(self) -> int:
        return len(self.counts)

    def split(self, at: int) -> tuple["Rows", "Rows"]:
        """The first `at` rows, and the others."""
        piece = int(self.counts[:at].sum())
        return (
            Rows(self.ids[:at], self.lengths[:piece], self.counts[:at]),
            Rows(self.ids[at:], self.lengths[piece:], self.counts[at:]),
        )


class Concat:
    """Documents end to end.

    >>> packer = Concat(seq_len=4)
    >>> packer.add(np.arange(9), np.array([6, 3]))
    >>> rows = packer.take(); rows.lengths.tolist(), rows.counts.tolist(), packer.left_over
    ([4, 2, 2], [1, 2], 1)
    """

    def __init__(self, seq_len: int, padding_id: int = 0):
        self.seq_len = seq_len
        self._ids: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self.left_over = 0  # tokens added and not yet given out

    @property
    def room(self) -> int:
        """Tokens up to the end of the row in hand: a long document given in parts that end there is packed as whole."""
        return self.seq_len - self.left_over % self.seq_len

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        self._ids.append(ids)
        self._lengths.append(lengths)
        self.left_over += len(ids)

    def take(self, last: bool = False) -> Rows:
        """All full rows so far; with `last`, what remains is left over."""
        rows = self.left_over // self.seq_len
        used = rows * self.seq_len
        ids = np.concatenate(self._ids) if self._ids else np.zeros(0, dtype=np.int64)
        ends = np.cumsum(np.concatenate(self._lengths)) if self._lengths else np.zeros(0, dtype=np.int64)
        cuts = np.union1d(ends[ends <= used], np.arange(1, rows + 1) * self.seq_len)
        counts = np.bincount((cuts - 1) // self.seq_len, minlength=rows) if rows else np.zeros(0, dtype=np.int64)
        self._ids, self.left_over = [ids[used:]], len(ids) - used
        self._lengths = [np.diff(ends[ends > used], prepend=used)]
        return Rows(ids[:used].reshape(rows, self.seq_len), np.diff(cuts, prepend=0), counts)


class BestFit:
    """Best-fit decreasing over windows of documents: the longest first, each into the fullest row that takes it."""

    def __init__(self, seq_len: int, padding_id: int = 0):
        self.seq_len, self.padding_id = seq_len, padding_id
        self.left_over = 0  # always 0 after take(last=True)
        self._pieces: list[np.ndarray] = []
        self._waiting = 0  # tokens in them
        self._full: list[list[np.ndarray]] = []  # rows that are finished
        self._open: list[list[np.ndarray]] = []  # rows with space

    @property
    def room(self) -> int:
        """As Concat's: a document's full rows are its own here."""
        return self.seq_len

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        for document in np.split(ids, np.cumsum(lengths)[:-1]):
            whole = len(document) // self.seq_len * self.seq_len
            self._full += [[row] for row in document[:whole].reshape(-1, self.seq_len)]
            if whole < len(document):
                self._pieces.append(document[whole:])
                self._waiting += len(document) - whole
        self.left_over += len(ids)
        if self._waiting >= WINDOW_TOKENS:
            self._fit()

    def _fit(self) -> None:
        """Place the waiting pieces. `free` holds open rows by their space; `spaces` has a bit for each that occurs."""
        free: dict[int, list[list[np.ndarray]]] = {}
        spaces = 0
        for row in self._open:
            space = self.seq_len - sum(map(len, row))
            free.setdefault(space, []).append(row)
            spaces |= 1 << space
        for piece in sorted(self._pieces, key=len, reverse=True):
            size = len(piece)
            fitting = spaces >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1  # the least that is enough
                row = free[space].pop()
                if not free[space]:
                    spaces ^= 1 << space
            else:
                space, row = self.seq_len, []
            row.append(piece)
            if space == size:
                self._full.append(row)
            else:
                free.setdefault(space - size, []).append(row)
                spaces |= 1 << (space - size)
        by_space = [row for space in sorted(free) for row in free[space]]  # the fullest first
        surplus = max(0, len(by_space) - OPEN_ROWS)
        self._full += by_space[:surplus]
        self._open, self._pieces, self._waiting = by_space[surplus:], [], 0

    def take(self, last: bool = False) -> Rows:
        """Finished rows so far; with `last`, all rows, padded where they are not full."""
        if last:
            self._fit()
            self._full += self._open
            self._open = []
        rows, self._full = self._full, []
        ids = np.full((len(rows), self.seq_len), self.padding_id, dtype=np.int64)
        for target, row in zip(ids, rows):
            start = 0
            for piece in row:
                target[start : start + len(piece)] = piece
                start += len(piece)
        lengths = np.array([len(piece) for row in rows for piece in row], dtype=np.int64)
        self.left_over -= int(lengths.sum())
        return Rows(ids, lengths, np.array([len(row) for row in rows], dtype=np.int64))


PACKERS = {"concat": Concat, "best_fit": BestFit}
