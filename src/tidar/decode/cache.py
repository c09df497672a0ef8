"""KV cache whose rows have lengths of their own.

Step tokens are written right behind each row's prefix; accepting j drafts moves that row's length by j and thereby
keeps exactly their keys and values. Rejected drafts and masks are overwritten by the next step. All tensors keep their
place in memory, so that a captured CUDA graph stays valid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

ROUND = 64
"""Slots that dense attention sees come in multiples of this: attention libraries plan anew for each shape."""


class RowCache(Cache):
    """Keys and values [B, H_kv, capacity, D] a layer, and lengths [B].

    Slot s of a row holds its token s for s < lengths[row]. Call `reserve(n, longest)` before a forward over n tokens a
    row; the model's attention layers then call `update`. After the forward, add the accepted counts to `lengths`.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.capacity = self.width = -(-capacity // ROUND) * ROUND
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._slots = self.lengths[:, None]

    def reserve(self, tokens: int, longest: int | None = None) -> None:
        """Aim the next forward's `tokens` behind each row's prefix.

        Dense attention will see `width` slots: enough for prefixes of at most `longest`, or all if that is not known.
        """
        self._slots = self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)
        wanted = self.capacity if longest is None else -(-(longest + tokens) // ROUND) * ROUND
        self.width = min(wanted, self.capacity)

    def layer(self, index: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [B, heads, capacity, dim] each; made when first asked for, layer by layer."""
        if index == len(self.keys):
            shape = (len(self.lengths), heads, self.capacity, dim)
            # Zeros, not garbage: attention weights of unused slots are zero, and 0 * nan would not be.
            for store in (self.keys, self.values):
                store.append(torch.zeros(shape, dtype=dtype, device=self.lengths.device))
        return self.keys[index], self.values[index]

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store key and value [B, H_kv, n, D] of layer `layer_idx`; returns the slots in use, [B, H_kv, width, D]."""
        stored = self.layer(layer_idx, key.shape[1], key.shape[3], key.dtype)
        rows = torch.arange(len(key), device=key.device)[:, None]
        for held, new in zip(stored, (key, value), strict=True):
            held[rows, :, self._slots] = new.transpose(1, 2)
        return stored[0][:, :, : self.width], stored[1][:, :, : self.width]

    def first(self, rows: int) -> RowCache:
        """The first `rows` rows as a cache of their own, in the same memory."""
        part = RowCache(0, self.capacity, self.lengths.device)
        part.lengths = self.lengths[:rows]
        part.keys, part.values = [k[:rows] for k in self.keys], [v[:rows] for v in self.values]
        return part

    def move_rows(self, rows: Tensor) -> None:
        """Bring the rows `rows` [n] to the front, in that order."""
        for tensor in (self.lengths, *self.keys, *self.values):
            tensor[: len(rows)] = tensor[rows]

    def copy_row(self, row: int, place: int, length: int) -> None:
        """Make row `place` a copy of row `row`, which holds `length` tokens."""
        self.lengths[place] = self.lengths[row]
        for tensor in (*self.keys, *self.values):
            tensor[place, :, :length] = tensor[row, :, :length]

    def put_rows(self, rows: Tensor, other: RowCache) -> None:
        """Put the rows of `other`, which may have less room, in the places `rows` [n]."""
        self.lengths[rows] = other.lengths
        width = min(self.capacity, other.capacity)
        for index, (key, value) in enumerate(zip(other.keys, other.values, strict=True)):
            held = self.layer(index, key.shape[1], key.shape[3], key.dtype)
            for mine, new in zip(held, (key, value), strict=True):
                mine[rows, :, :width] = new[:, :, :width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Longest row, in tokens (what transformers asks for where positions are not passed)."""
        return int(self.lengths.max())
