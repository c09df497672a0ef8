"""Which mask blocks a batch trains: where they are anchored, and which of their tokens are shown instead of masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tidar.layout import chain_layout, random_anchors, tiled_anchors
from tidar.train.data import collate
from tidar.train.objective import random_masks


@dataclass(frozen=True)
class BlockDraw:
    """Collates rows and draws their blocks, on the CPU.

    Attributes:
        block_size: K.
        budget: blocks a row; 0 for as many as tile it.
        tiled: anchors K-1, 2K-1, ... (a random part of them under a budget); else random ones, before answers.
        random: show a random part of every block's tokens, see `random_masks`.
    """

    block_size: int
    budget: int = 0
    tiled: bool = False
    random: bool = False

    def __call__(self, rows: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        return self.draw(collate(rows, self.count(len(rows[0]["ids"]))))

    def count(self, length: int) -> int:
        """Blocks of a row of `length` tokens."""
        if not self.tiled:
            return self.budget or max(1, length // self.block_size)
        tiles = tiled_anchors(length, self.block_size).shape[1]
        return min(self.budget or tiles, tiles)

    def draw(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of `collate` with its own anchors (none if all tiles are meant) and `shown` [B, blocks, K].

        The rows are independent of each other, and all have the same entries.
        """
        batch = dict(batch)
        if self.tiled:
            anchors = self._tiles(batch)
            batch["anchors"] = anchors
        if self.random:
            layout = chain_layout(batch["input_ids"].shape[1], batch["anchors"], self.block_size, batch["documents"])
            index, inside = layout.targets()
            answer = inside & at_targets(batch["answers"], index)
            batch["shown"] = inside & ~random_masks(answer)
        if self.tiled and not self._limited(batch):
            del batch["anchors"]
        return batch

    def _limited(self, batch: dict[str, Tensor]) -> bool:
        length = batch["input_ids"].shape[1]
        return self.count(length) < tiled_anchors(length, self.block_size).shape[1]

    def _tiles(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, blocks] ends of tiles; under a budget random ones, first of all those with something to learn."""
        rows, length = batch["input_ids"].shape
        tiles = tiled_anchors(length, self.block_size).expand(rows, -1)
        if not self._limited(batch):
            return tiles
        index, inside = chain_layout(length, tiles, self.block_size, batch["documents"]).targets()
        useful = (inside & at_targets(batch["answers"], index)).any(-1)
        return tiles.gather(1, random_anchors(useful, self.budget))


def without_single_documents(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole batch, without `documents` if each row is one: its layout may then be the same as other batches'."""
    documents = batch["documents"]
    alone = bool((documents == documents[:, :1]).all())
    return {name: value for name, value in batch.items() if name != "documents" or not alone}


def collate_blocks(draw: Callable[[Sequence[Any]], dict[str, Tensor]], rows: Sequence[Any]) -> dict[str, Tensor]:
    """What a data loader needs: rows to a batch by `draw`, in its shortest form."""
    return without_single_documents(draw(rows))


def at_targets(values: Tensor, index: Tensor) -> Tensor:
    """[B, blocks, K] of `values` [B, S] at the clean tokens `index` [B, blocks, K]."""
    return values.gather(1, index.flatten(1)).view_as(index)
