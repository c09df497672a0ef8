"""KV cache whose rows have lengths of their own.

Step tokens are written right behind each row's prefix; accepting j drafts moves that row's length by j and thereby
keeps exactly their keys and values. Rejected drafts and masks are overwritten by the next step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

ROUND = 64
"""Slots that attention sees come in multiples of this."""


class RowCache(Cache):
    """Keys and values [B, H_kv, capacity, D] a layer, and lengths [B].

    Slot s of a row holds its token s for s < lengths[row]. Call `reserve(n, longest)` before a forward over n tokens a
    row; the model's attention layers then call `update`. After the forward, add the accepted counts to `lengths`.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.width = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._rows = torch.arange(batch, device=device)[:, None]
        self._slots = self._rows

    def reserve(self, tokens: int, longest: int) -> None:
        """Make room for `tokens` behind prefixes of at most `longest`; attention will see `width` slots.

        The width is rounded up, so that shapes stay the same for many steps: attention libraries plan anew for each.
        """
        self._slots = self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)
        self.width = -(-(longest + tokens) // ROUND) * ROUND

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store key and value [B, H_kv, n, D] of layer `layer_idx`; returns the slots in use, [B, H_kv, width, D]."""
        if layer_idx == len(self.keys):
            self.keys.append(_room(key, self.width))
            self.values.append(_room(value, self.width))
        for store, new in ((self.keys, key), (self.values, value)):
            held = store[layer_idx] = _grow(store[layer_idx], self.width)
            held[self._rows, :, self._slots] = new.transpose(1, 2)
        return self.keys[layer_idx][:, :, : self.width], self.values[layer_idx][:, :, : self.width]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop every row but `rows` [n]."""
        self.lengths = self.lengths[rows]
        self._rows = self._rows[: len(rows)]
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]

    def put_rows(self, rows: Tensor, other: RowCache) -> None:
        """Put the rows of `other` in the places `rows` [n] of this batch."""
        self.lengths[rows] = other.lengths
        for store, new in ((self.keys, other.keys), (self.values, other.values)):
            for layer, tensor in enumerate(new):
                store[layer] = _grow(store[layer], tensor.shape[2])
                store[layer][rows, :, : tensor.shape[2]] = tensor

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Longest row, in tokens (what transformers asks for where positions are not passed)."""
        return int(self.lengths.max())


def _room(like: Tensor, slots: int) -> Tensor:
    """Zeros, not garbage: attention weights of unused slots are zero, and 0 * nan would not be."""
    batch, heads, _, dim = like.shape
    return like.new_zeros(batch, heads, slots, dim)


def _grow(tensor: Tensor, capacity: int) -> Tensor:
    if tensor.shape[2] >= capacity:
        return tensor
    more = max(capacity - tensor.shape[2], 2 * ROUND)
    return torch.cat((tensor, _room(tensor, more)), 2)
