"""How decoding asks the model about masks: a full pass, a pass over a window, or one that also checks drafts.

The shift decides which rows a prediction needs: p_j comes from hidden state j − 1. So the window of a block [a, b)
begins at a − 1, and a draft x_j is checked by a second copy of position j − 1.
"""

from typing import Any

import torch

from .attention import AttentionPlan
from .cache import WindowCache
from .visibility import positions_of


def uses_shift(config: Any) -> bool:
    """Whether hidden state i predicts token i + 1, as the AR model taught it, and not token i itself."""
    return (getattr(config, "diffusion", None) or {}).get("shift", True)


class Reader:
    """Asks `model` about rows of tokens whose padding is False in `real` (B, L).

    Every row is read as if it were alone: rows that need nothing are left out of a pass, and with a cache each row
    has its full passes when it needs them, whatever the others do.
    """

    def __init__(
        self,
        model: Any,
        real: torch.Tensor,
        cached: bool = False,
        refresh_every: int | None = None,
        static_width: int | None = None,
    ):
        """`static_width`: for compiled models, whose inputs should keep their shapes: of a window, for one row."""
        self.model, self.real, self.refresh_every, self.static_width = model, real, refresh_every, static_width
        self.padded = not bool(real.all())
        self.shift = uses_shift(model.config)
        self.position = positions_of(real)
        self.cache = WindowCache(*real.shape) if cached else None
        self.since_full = torch.zeros(len(real), dtype=torch.long, device=real.device)
        self.read_fully = torch.full_like(self.since_full, -1)  # the block in which each row had its last full pass

    def logits(self, ids: torch.Tensor, at: torch.Tensor, block: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        """(N, V): of the N positions in `at` (B, L), in row-major order. One pass for each row that has some.

        `block` (B, L) bool: the block that each row is filling; `current` (B,): its number.
        """
        rows = at.any(dim=1)
        if self.cache is None:
            return self._full(ids, at, rows if self.static_width is None else torch.ones_like(rows))
        stale = self.read_fully != current
        if self.refresh_every is not None:
            stale |= self.since_full >= self.refresh_every
        full, window = rows & stale, rows & ~stale
        self.since_full = torch.where(full, 1, self.since_full + window)
        self.read_fully = torch.where(full, current, self.read_fully)
        if not window.any():
            return self._full(ids, at, full)
        if not full.any():
            return self._window(ids, at, block, window)
        row_of = at.nonzero()[:, 0]
        first, second = self._full(ids, at, full), self._window(ids, at, block, window)
        found = first.new_empty(len(row_of), first.shape[1])
        found[full[row_of]], found[window[row_of]] = first, second
        return found

    def _full(self, ids: torch.Tensor, at: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits of `at` from a pass over all positions of the rows in `rows` (B,) bool."""
        extra: dict[str, Any] = {}
        if self.cache is not None:
            self.cache.rows, self.cache.positions = rows.nonzero()[:, 0], None
            extra["past_key_values"] = self.cache
        if self.padded:
            extra["attention_mask"] = self.real[rows]
        return self.model(input_ids=ids[rows], logits_at=at[rows], **extra).logits

    def _window(self, ids: torch.Tensor, at: torch.Tensor, block: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits of `at` from a pass over the blocks of the rows in `rows` (B,) bool and what predicts their firsts."""
        assert self.cache is not None, "a window pass needs a cache"
        position, real = window_of(block[rows], self.shift, self.static_width)
        self.cache.rows, self.cache.positions = rows.nonzero()[:, 0], position
        return self.model(
            input_ids=ids[rows].gather(1, position),
            position_ids=self.position[rows].gather(1, position),
            attention_mask=self.real[rows] if self.padded else None,
            logits_at=at[rows].gather(1, position) & real,
            past_key_values=self.cache,
        ).logits

    def logits_and_checks(
        self, ids: torch.Tensor, at: torch.Tensor, drafts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, V) logits of `at`, and (M, V) of the M drafts (B, L bool), each predicted with itself hidden.

        WINO, arXiv 2507.18578, with the shift: draft x_j gets a shadow, a copy of what predicts it that sees every
        token but x_j, and that nobody sees. With the shift that is token j − 1 at its position, in whose place
        the shadow sees itself; without, a mask token at position j. One pass for all rows that have something in
        `at`. Other tokens saw x_j, so what the shadow sees of them knows it still.
        """
        rows = (at | drafts).any(dim=1)
        at, drafts, tokens, real = at[rows], drafts[rows], ids[rows], self.real[rows]
        batch, length = tokens.shape
        count = drafts.sum(dim=1)
        width = int(count.max())
        slot = torch.arange(width, device=ids.device)
        used = slot < count[:, None]  # (b, S)
        draft = torch.zeros(batch, width, dtype=torch.long, device=ids.device)
        draft[used] = drafts.nonzero()[:, 1]
        origin = (draft - 1).clamp(min=0) if self.shift else draft
        copies = tokens.gather(1, origin)
        if not self.shift:
            copies = torch.full_like(copies, self.model.config.mask_token_id)
        visible = torch.zeros(batch, length + width, length + width, dtype=torch.bool, device=ids.device)
        visible[:, :length, :length] = real[:, None, :] & real[:, :, None]
        shadows = real[:, None, :].repeat(1, width, 1)
        shadows.scatter_(2, draft[:, :, None], False).scatter_(2, origin[:, :, None], False)
        visible[:, length:, :length] = shadows
        visible |= torch.eye(length + width, dtype=torch.bool, device=ids.device)  # padding too sees something
        position = self.position[rows]
        hidden = self.model.diffusion_backbone(
            input_ids=torch.cat([tokens, copies], dim=1),
            position_ids=torch.cat([position, position.gather(1, origin)], dim=1),
            use_cache=False,
            attention_plan=AttentionPlan("sdpa", mask=visible[:, None]),
        ).last_hidden_state  # (b, L + S, H)
        head = self.model.vocabulary_head()
        main = hidden[:, :length]
        if self.shift:
            main = torch.cat([main[:, :1], main[:, :-1]], dim=1)
        return head(main[at]), head(hidden[:, length:][used])


def window_of(block: torch.Tensor, shift: bool, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, W) positions to compute for the blocks (b, L) of some rows, and which of them are no repetitions.

    From what predicts the first token of a block to its last token; shorter ones repeat their last position, so that
    what else is in the batch changes nothing. W is that of the widest, or `width`.
    """
    first = block.long().argmax(dim=1, keepdim=True)
    last = block.shape[1] - 1 - block.flip(1).long().argmax(dim=1, keepdim=True)
    if shift:
        first = first - 1
    offset = torch.arange(width or int((last - first).max()) + 1, device=block.device)
    position = first + offset
    return position.clamp(max=last), position <= last
