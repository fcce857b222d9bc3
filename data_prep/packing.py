"""Token ids of documents into rows of exactly `seq_len` tokens, document boundaries kept.

In: batches of documents, as their ids end to end and their lengths. Out: `PackedRows`, which also have
the lengths of the pieces of documents in each row, so that attention can be isolated per document.

`concat` cuts documents at row ends and goes on in the next row, as the DiffuLLaMA reference does; of the
tokens that fill no row at the end, those held out make a padded row and the others are dropped. `best_fit`
keeps every document that fits a row whole and cuts longer ones at row ends; the end of a row may be padding,
and no token is dropped.
"""

from dataclasses import dataclass, fields

import numpy as np

WINDOW_TOKENS = 1 << 22  # best_fit collects this many tokens of documents, then sorts and places them
OPEN_ROWS = 1024  # unfilled rows that best_fit keeps for the next window


@dataclass
class PackedRows:
    """Rows with the lengths of the pieces of documents in them."""

    ids: np.ndarray  # (rows, seq_len)
    lengths: np.ndarray  # (pieces,) of all rows, row after row
    counts: np.ndarray  # (rows,) pieces in each row
    continues: np.ndarray  # (rows,) bool: the row's last document goes on after it; of `concat` alone

    def __len__(self) -> int:
        return len(self.counts)

    def split(self, at: int) -> tuple["PackedRows", "PackedRows"]:
        """The first `at` rows, and the others."""
        piece = int(self.counts[:at].sum())
        return (
            PackedRows(self.ids[:at], self.lengths[:piece], self.counts[:at], self.continues[:at]),
            PackedRows(self.ids[at:], self.lengths[piece:], self.counts[at:], self.continues[at:]),
        )


def join(parts: list[PackedRows]) -> PackedRows:
    """The rows of all parts, of which there is at least one."""
    if len(parts) == 1:
        return parts[0]
    names = [field.name for field in fields(PackedRows)]
    return PackedRows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def padding_id(special_ids: dict[str, int | None]) -> int:
    """The id that fills the rest of a row: pad, else eos, else 0."""
    return next((i for i in (special_ids["pad"], special_ids["eos"]) if i is not None), 0)


class Concat:
    """Documents end to end.

    >>> packer = Concat(seq_len=4)
    >>> packer.add(np.arange(9), np.array([6, 3]))
    >>> rows = packer.take(); rows.lengths.tolist(), rows.counts.tolist(), rows.continues.tolist()
    ([4, 2, 2], [1, 2], [True, True])
    >>> packer.pending_tokens
    1
    """

    def __init__(self, seq_len: int, padding_id: int = 0, pad_last: bool = False):
        self.seq_len = seq_len
        self.padding_id = padding_id
        self.pad_last = pad_last
        self.pending_tokens = 0  # added and not yet taken; after take(last=True), dropped
        self._ids: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []  # of documents, from the first pending token on

    def add(self, ids: np.ndarray, lengths: np.ndarray, goes_on: bool = False) -> None:
        """Add documents of at least a token each; with `goes_on`, the next call begins with more of the last one."""
        ends = self.pending_tokens + np.cumsum(lengths)
        self._ids.append(ids)
        self._ends.append(ends[:-1] if goes_on else ends)
        self.pending_tokens += len(ids)

    def take(self, last: bool = False) -> PackedRows:
        """All full rows so far; with `last` and `pad_last` also the padded rest, which is dropped otherwise."""
        ids = np.concatenate(self._ids) if self._ids else np.zeros(0, dtype=np.int64)
        ends = np.concatenate(self._ends) if self._ends else np.zeros(0, dtype=np.int64)
        rows, rest = divmod(len(ids), self.seq_len)
        used = rows * self.seq_len
        row_ends = np.arange(1, rows + 1) * self.seq_len
        if last and self.pad_last and rest:
            rows += 1
            used = len(ids)
            row_ends = np.append(row_ends, used)
            ids = np.append(ids, np.full(self.seq_len - rest, self.padding_id, dtype=ids.dtype))
        cuts = np.union1d(ends[ends <= used], row_ends)
        counts = np.bincount((cuts - 1) // self.seq_len, minlength=rows) if rows else np.zeros(0, dtype=np.int64)
        self._ids = [ids[rows * self.seq_len :]]
        self._ends = [ends[ends > used] - used]
        self.pending_tokens -= used
        ids = ids[: rows * self.seq_len].reshape(rows, self.seq_len)
        return PackedRows(ids, np.diff(cuts, prepend=0), counts, ~np.isin(row_ends, ends))


class BestFit:
    """Best-fit decreasing over windows of documents: the longest first, each into the fullest row that takes it."""

    def __init__(self, seq_len: int, padding_id: int = 0):
        self.seq_len = seq_len
        self.padding_id = padding_id
        self.pending_tokens = 0  # added and not yet taken; none after take(last=True)
        self._unfinished: list[np.ndarray] = []  # the tokens of a document that goes on, after its full rows
        self._pieces: list[np.ndarray] = []  # documents, or their last parts, that wait to be placed
        self._waiting_tokens = 0  # in them
        self._full: list[list[np.ndarray]] = []  # finished rows, each a list of pieces
        self._open: list[list[np.ndarray]] = []  # rows with space left

    def add(self, ids: np.ndarray, lengths: np.ndarray, goes_on: bool = False) -> None:
        """As Concat's."""
        documents = np.split(ids, np.cumsum(lengths)[:-1])
        self.pending_tokens += len(ids)
        documents[0] = np.concatenate([*self._unfinished, documents[0]])
        self._unfinished = []
        for number, document in enumerate(documents, 1):
            whole = len(document) // self.seq_len * self.seq_len
            self._full += [[row] for row in document[:whole].reshape(-1, self.seq_len)]
            if goes_on and number == len(documents):
                self._unfinished = [document[whole:]]
            elif whole < len(document):
                self._pieces.append(document[whole:])
                self._waiting_tokens += len(document) - whole
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
        # copies, or a piece that waits long would keep its whole batch of documents in memory
        self._open = [[piece if piece.base is None else piece.copy() for piece in row] for row in by_space[surplus:]]
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
        dtype = rows[0][0].dtype if rows else np.int64
        ids = np.full((len(rows), self.seq_len), self.padding_id, dtype=dtype)
        for target, row in zip(ids, rows):
            start = 0
            for piece in row:
                target[start : start + len(piece)] = piece
                start += len(piece)
        lengths = np.array([len(piece) for row in rows for piece in row], dtype=np.int64)
        self.pending_tokens -= int(lengths.sum())
        counts = np.array([len(row) for row in rows], dtype=np.int64)
        return PackedRows(ids, lengths, counts, np.zeros(len(rows), dtype=bool))


def make_packer(packing: str, seq_len: int, padding_id: int, split: str) -> Concat | BestFit:
    """The packer of a split. Held-out documents are few: `concat` pads their last row, to lose none of them."""
    if packing == "best_fit":
        return BestFit(seq_len, padding_id)
    return Concat(seq_len, padding_id, pad_last=split == "validation")
