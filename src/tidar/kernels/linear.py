"""A linear layer over few rows (1 to a few hundred): bound by reading the weights, so it is built around that stream.

The weight tile is the tall operand of the matrix product and the rows are its narrow one, in one or two accumulators
(64 + 16 rows for 72 slots, 256 + 16 for 272), because tensor-core tiles are powers of two and slots are not. The first
weight tiles are fetched into L2 before the kernel waits for its input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar.kernels.launch import options, prefetch, tl, triton


class Tiling(NamedTuple):
    """How a product is cut: weight rows a program (power of two), columns a loop step, programs that share a row."""

    rows: int
    columns: int
    split: int
    warps: int
    stages: int


def linear_eager(x: Tensor, weight: Tensor) -> Tensor:
    """[1, T, N]: x [T, K] times weight [N, K] transposed, as one partial sum."""
    return F.linear(x, weight)[None]


def linear(x: Tensor, weight: Tensor, tiling: Tiling | None = None, unrounded: bool = False) -> Tensor:
    """Partial sums [split, T, N] of x [T, K] times weight [N, K] transposed; whoever reads them adds them up.

    With split 1 the result has x's dtype, unless it is asked for `unrounded`; else it is float32.
    """
    tokens, inner = x.shape
    out = weight.shape[0]
    if tiling is None and x.dtype != torch.float32:  # float32 is for checking, and its tiles would not fit
        tiling = choose(tokens, out, inner)
    if tiling is None:
        if unrounded and x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, weight.t(), out_dtype=torch.float32)[None]
        return linear_eager(x, weight)
    first, second = tile_rows(tokens)
    whole = tiling.split == 1 and not unrounded
    y = x.new_empty(tiling.split, tokens, out, dtype=x.dtype if whole else torch.float32)
    _linear[(triton.cdiv(out, tiling.rows), tiling.split)](
        x,
        weight,
        y,
        tokens,
        out,
        inner,
        tiling.split,
        x.stride(0),
        weight.stride(0),
        BN=tiling.rows,
        BK=tiling.columns,
        T1=first,
        T2=second,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **options(x.device),
    )
    return y


def tile_rows(tokens: int) -> tuple[int, int]:
    """The two accumulators' widths (powers of two, at least 16; the second may be 0) that hold `tokens` rows."""
    for total in range(-(-tokens // 16) * 16, 1025, 16):
        first = 1 << (total.bit_length() - 1)
        rest = total - first
        if rest == 0 or (rest >= 16 and rest & (rest - 1) == 0):
            return first, rest
    raise ValueError(f"{tokens} rows are too many for one tile")


def choose(tokens: int, out: int, inner: int) -> Tiling | None:
    """A tiling by what was measured on an H100 (results/linear-h100.json), or None where cuBLAS was faster.

    Small weights need more programs than they have tiles of rows, so their columns are split.
    """
    rows, columns = 64, 128
    tiles = -(-out // rows)
    if tokens > 128 or (tokens > 16 and tiles > 128):
        return None
    split = 1
    while split < 8 and tiles * split < (256 if tokens <= 16 else 96) and inner >= 2 * split * 256:
        split *= 2
    return Tiling(rows, columns, split, 4, 4)


if triton is not None:

    @triton.jit
    def _linear(
        x,
        w,
        y,
        tokens,
        out,
        inner,
        split,
        stride_x,
        stride_w,
        BN: tl.constexpr,
        BK: tl.constexpr,
        T1: tl.constexpr,
        T2: tl.constexpr,
        PDL: tl.constexpr,
    ):
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        part = tl.program_id(1)
        steps = tl.cdiv(tl.cdiv(inner, BK), split)
        begin = part * steps * BK
        end = tl.minimum(inner, begin + steps * BK)
        k = tl.arange(0, BK)
        w_row = w + n[:, None].to(tl.int64) * stride_w
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            line = begin + tl.arange(0, BK // 64) * 64
            prefetch(w_row + line[None, :], (n[:, None] < out) & (line[None, :] < end), w)
            tl.extra.cuda.gdc_wait()
        t1 = tl.arange(0, T1)
        first = tl.zeros((BN, T1), tl.float32)
        x1 = x + t1[:, None] * stride_x
        if T2:
            t2 = T1 + tl.arange(0, T2)
            second = tl.zeros((BN, T2), tl.float32)
            x2 = x + t2[:, None] * stride_x
        for at in range(begin, end, BK):
            inside = at + k < end
            tile = tl.load(w_row + (at + k)[None, :], mask=(n[:, None] < out) & inside[None, :], other=0.0)
            rows = tl.load(x1 + (at + k)[None, :], mask=(t1[:, None] < tokens) & inside[None, :], other=0.0)
            first = tl.dot(tile, tl.trans(rows), first, input_precision="ieee")
            if T2:
                rows = tl.load(x2 + (at + k)[None, :], mask=(t2[:, None] < tokens) & inside[None, :], other=0.0)
                second = tl.dot(tile, tl.trans(rows), second, input_precision="ieee")
        y += part.to(tl.int64) * tokens * out
        at1 = y + t1[None, :] * out + n[:, None]
        tl.store(at1, first.to(y.dtype.element_ty), mask=(t1[None, :] < tokens) & (n[:, None] < out))
        if T2:
            at2 = y + t2[None, :] * out + n[:, None]
            tl.store(at2, second.to(y.dtype.element_ty), mask=(t2[None, :] < tokens) & (n[:, None] < out))
