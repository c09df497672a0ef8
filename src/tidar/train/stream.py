"""The order in which rows are trained on, and their random anchors: a pure function of (seed, place in the run).

Neither depends on the state of a random generator or on the number of processes. So a run's data cursor is one number,
the rows it has consumed, and a resumed run sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class Rows(Sized, Protocol):
    """Packed rows, by index."""

    def __getitem__(self, index: int) -> Any: ...


class Placed(NamedTuple):
    """A row, and the seed of whatever is random about it."""

    row: Any
    seed: int


class Stream(Dataset):
    """Places `start` .. `start + length - 1` of an endless run over `rows`, which are shuffled anew in every epoch."""

    def __init__(self, rows: Rows, seed: int, start: int, length: int) -> None:
        self.rows, self.seed, self.start, self.length = rows, seed, start, length
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Placed:
        place = self.start + index
        epoch, within = divmod(place, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        return Placed(self.rows[int(self._order[within])], _key(self.seed, place))


def collate_placed(collate: Callable[[Sequence[Any]], dict[str, Tensor]], batch: Sequence[Placed]) -> dict[str, Tensor]:
    """`collate`, row by row, each with torch's CPU generator seeded by its place; the generator is left as it was."""
    before = torch.get_rng_state()
    try:
        parts = []
        for row, seed in batch:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
            parts.append(collate([row]))
    finally:
        torch.set_rng_state(before)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _key(seed: int, place: int) -> int:
    """32 well-mixed bits: the CPU generator looks at no more of a seed."""
    return int(np.random.SeedSequence((seed, place)).generate_state(1)[0])
