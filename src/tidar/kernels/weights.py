"""Weights of eight bits: every row of a linear layer's weight is int8 or fp8 (e4m3) numbers times one float32 scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""The type of the numbers, and the largest one that is used."""


@dataclass(frozen=True)
class QuantWeight:
    """values [N, K] int8 or fp8; scale [N] float32. The weight is their product."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    @property
    def kind(self) -> str:
        return next(kind for kind, (dtype, _) in KINDS.items() if dtype == self.values.dtype)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Tensor) -> QuantWeight:
        """Some rows; ids [...] give a weight [..., K]."""
        return QuantWeight(self.values[rows], self.scale[rows])

    def to(self, dtype: torch.dtype) -> Tensor:
        """The weight itself, each number rounded to `dtype` once."""
        return self.values.to(dtype).mul_(self.scale[..., None])


def quantise(weight: Tensor, kind: str) -> QuantWeight:
    """The nearest numbers to weight [N, K], scaled so that the largest of a row is the largest of its kind."""
    dtype, most = KINDS[kind]
    scale = weight.abs().amax(-1).float() / most
    ratio = (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).clamp_(-most, most)
    return QuantWeight((ratio.round_() if kind == "int8" else ratio).to(dtype), scale)


def stack(weights: list[QuantWeight]) -> QuantWeight:
    """All their rows in one piece of memory."""
    return QuantWeight(torch.cat([w.values for w in weights]), torch.cat([w.scale for w in weights]))
