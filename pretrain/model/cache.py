"""Keys and values of a bidirectional model, kept between the steps of decoding.

A full pass stores K and V of every position and layer. A window pass then computes a few positions alone: their own K
and V overwrite the stored ones, and they attend to all. Between full passes what stands outside the window is as it
was at the last full pass, which is an approximation: its tokens cannot react to what the window has committed.
"""

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class WindowCache(Cache):
    """A `past_key_values` for models whose positions may come back: `update` writes into given positions.

    `rows` (b,) and `positions` (b, W) say where the next forward writes; `positions` None is a full pass, of all
    positions in order. A position that appears twice in a row of `positions` holds the same token twice.
    """

    def __init__(self, batch: int, length: int):
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.batch, self.length = batch, length
        self.stored: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer: K, V (B, key_value_heads, L, D)
        self.rows = torch.arange(batch)
        self.positions: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store K and V (b, key_value_heads, W, D) of the positions; return those of all positions of the rows."""
        if layer_idx == len(self.stored):
            heads = key_states.shape[1]
            made = [x.new_zeros(self.batch, heads, self.length, x.shape[-1]) for x in (key_states, value_states)]
            self.stored.append((made[0], made[1]))
        everyone = len(self.rows) == self.batch
        found = []
        for kept, new in zip(self.stored[layer_idx], (key_states, value_states)):
            if self.positions is None:
                kept[self.rows] = new
                found.append(new)
            else:
                kept[self.rows[:, None], :, self.positions] = new.transpose(1, 2)
                found.append(kept if everyone else kept[self.rows])
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are given to the model, not counted on from what is stored."""
        return 0
