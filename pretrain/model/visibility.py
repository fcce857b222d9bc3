"""Who sees whom in a packed row: a form of visibility and the documents. Every attention backend obeys it."""

from dataclasses import dataclass, field, replace

import torch

from .forms import Form, Full, numbers_of


@dataclass(frozen=True)
class Visibility:
    """Which positions each position attends to.

    `documents` (B, L) numbers the document of each token. Positions of different documents do not see each
    other, and the form counts i and j from the document's start, so a packed document is treated as if it
    stood alone. None: one document a row.
    """

    form: Form = field(default_factory=Full)
    documents: torch.Tensor | None = None

    def simplified(self, length: int) -> "Visibility":
        """The same visibility, with the form `Full` or `Causal` where it is one of them for rows of `length`."""
        return replace(self, form=self.form.simplified(length))

    def dense(self, length: int, device: torch.device | str) -> torch.Tensor | None:
        """(1 or B, 1, L, L) bool, True where visible; None when every position sees every other."""
        if self.documents is None:
            if isinstance(self.form, Full):
                return None
            position = torch.arange(length, device=device)
            return self._mask(position[:, None], position[None, :])[None, None]
        same = self.documents[:, None, :, None] == self.documents[:, None, None, :]
        if isinstance(self.form, Full):
            return same
        position = positions(self.documents)
        return same & self._mask(position[:, None, :, None], position[:, None, None, :])

    def _mask(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return self.form.mask_mod(i, j, *numbers_of(self.form))


def starts(documents: torch.Tensor) -> torch.Tensor:
    """(B, L) bool: the first token of each document, and of each row."""
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return first


def positions(documents: torch.Tensor) -> torch.Tensor:
    """(B, L) int64: each token's position in its document."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return index - torch.where(starts(documents), index, 0).cummax(dim=1).values


def with_padding(visibility: Visibility, attention_mask: torch.Tensor) -> Visibility:
    """The visibility of rows with padding, where `attention_mask` (B, L) is 0; it and tokens do not see each other.

    Raises ValueError for a visibility with documents, and for zeros between tokens.
    """
    if visibility.documents is not None:
        raise ValueError("attention_mask is for rows with padding, not for packed rows with documents")
    real = attention_mask.long()
    if (starts(real) & (real == 1)).sum(dim=1).max() > 1:
        raise ValueError("attention_mask has zeros between tokens; padding stands before or after a row")
    return replace(visibility, documents=real)


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, L) int64: the position of each token of a padded row. Left padding does not move a sequence."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Segments:
    """Documents of a batch of packed rows, end to end, in the terms of varlen kernels."""

    cu_seqlens: torch.Tensor = field(repr=False)  # (documents + 1,) int32: where each starts in the B·L tokens
    max_seqlen: int  # tokens in the longest

    @classmethod
    def of(cls, visibility: Visibility, batch: int, length: int, device: torch.device) -> "Segments":
        """The segments of a batch of `batch` rows; a row is one document where `visibility.documents` is None."""
        if visibility.documents is None:
            return cls(torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device), length)
        begin = starts(visibility.documents).flatten().nonzero().flatten()
        cu_seqlens = torch.cat([begin, begin.new_tensor([batch * length])]).to(torch.int32)
        return cls(cu_seqlens, int(cu_seqlens.diff().max()))
