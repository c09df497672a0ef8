"""A linear layer over few rows (1 to a few hundred): bound by reading the weights, so it is built around that stream.

The weight tile is the tall operand of the matrix product and the rows are its narrow one, in one or two accumulators
(64 + 16 rows for 72 slots, 256 + 16 for 272), because tensor-core tiles are powers of two and slots are not. The first
weight tiles are fetched into L2 before the kernel waits for its input. Weights of eight bits (see weights.py) become
x's dtype on their way to the tensor cores, which is exact, and the sums are multiplied by their row's scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar.kernels.launch import options, prefetch, stages_for, tl, triton
from tidar.kernels.weights import BLOCK, QuantWeight, unpack, unpacking

CACHE_LINE = 128
"""Bytes that are fetched together."""


class Tiling(NamedTuple):
    """How a product is cut: weight rows a program (power of two), columns a loop step, programs that share a row."""

    rows: int
    columns: int
    split: int
    warps: int
    stages: int


def linear_eager(x: Tensor, weight: Tensor | QuantWeight) -> Tensor:
    """[1, T, N]: x [T, K] times weight [N, K] transposed, as one partial sum."""
    return F.linear(x, weight.to(x.dtype))[None]


def linear(x: Tensor, weight: Tensor | QuantWeight, tiling: Tiling | None = None, unrounded: bool = False) -> Tensor:
    """Partial sums [split, T, N] of x [T, K] times weight [N, K] transposed; whoever reads them adds them up.

    With split 1 the result has x's dtype, unless it is asked for `unrounded`; else it is float32.

    Raises:
        ValueError: for a tiling whose steps do not hold whole blocks of interleaved numbers.
    """
    tokens, inner = x.shape
    out = weight.shape[0]
    values, scale = (weight.values, weight.scale) if isinstance(weight, QuantWeight) else (weight, None)
    if tiling is None and x.dtype != torch.float32:  # float32 is for checking, and its tiles would not fit
        tiling = choose(tokens, out, inner) if scale is None else choose_quantised(tokens, out, inner)
    if tiling is None:
        if unrounded and x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, weight.to(x.dtype).t(), out_dtype=torch.float32)[None]
        return linear_eager(x, weight)
    first, second = tile_rows(tokens)
    words = isinstance(weight, QuantWeight) and weight.interleaved
    numbers = values.view(torch.int32) if words else values
    if words and tiling.columns % BLOCK:
        raise ValueError(f"{tiling.columns} columns a step, but numbers are interleaved by {BLOCK}")
    tile = tiling.columns * (tiling.rows * values.element_size() + (first + second) * x.element_size())
    whole = tiling.split == 1 and not unrounded
    y = x.new_empty(tiling.split, tokens, out, dtype=x.dtype if whole else torch.float32)
    _linear[(triton.cdiv(out, tiling.rows), tiling.split)](
        x,
        numbers,
        scale if scale is not None else values,
        y,
        tokens,
        out,
        inner,
        tiling.split,
        x.stride(0),
        numbers.stride(0),
        BN=tiling.rows,
        BK=tiling.columns,
        T1=first,
        T2=second,
        SCALED=scale is not None,
        WORD=4 if words else 1,
        INTEGER=values.dtype == torch.int8,
        ASM=unpacking(values.dtype, x.dtype),
        LINES=max(1, tiling.columns * values.element_size() // CACHE_LINE),
        num_warps=tiling.warps,
        num_stages=max(1, stages_for(x.device, tiling.stages, tile)),
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
    if tokens > 128 or (tokens > 16 and out > 128 * 64):
        return None
    return Tiling(64, 128, _split(tokens, -(-out // 64), inner), 4, 4)


def choose_quantised(tokens: int, out: int, inner: int) -> Tiling | None:
    """The same for weights of eight bits; None from where they are better multiplied out for cuBLAS, as in prefills."""
    if tokens > 272:
        return None
    # Half the bytes a tile: more of them must be under way to keep the memory busy.
    least = 2 if inner >= 1024 else 1
    if tokens > 192:  # rows of weights for two groups of warps, so that the sums fit their registers
        return Tiling(128, 64, max(least, _split(tokens, -(-out // 128), inner)), 8, 3)
    if tokens > 128:
        return Tiling(64, 64, _split(tokens, -(-out // 64), inner), 4, 4)
    return Tiling(64, 128, max(least if tokens <= 16 else 1, _split(tokens, -(-out // 64), inner)), 4, 4)


def _split(tokens: int, tiles: int, inner: int) -> int:
    """Into how many programs a tile of weight rows is divided, so that there is work for the whole GPU."""
    split = 1
    while split < 8 and tiles * split < (256 if tokens <= 16 else 96) and inner >= 2 * split * 256:
        split *= 2
    return split


if triton is not None:

    @triton.jit
    def _linear(
        x,
        w,
        scales,
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
        SCALED: tl.constexpr,
        WORD: tl.constexpr,
        INTEGER: tl.constexpr,
        ASM: tl.constexpr,
        LINES: tl.constexpr,
        PDL: tl.constexpr,
    ):
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        part = tl.program_id(1)
        steps = tl.cdiv(tl.cdiv(inner, BK), split)
        begin = part * steps * BK
        end = tl.minimum(inner, begin + steps * BK)
        w_row = w + n[:, None].to(tl.int64) * stride_w
        k, word = tl.arange(0, BK), tl.arange(0, BK // WORD)
        of_word = (
            word // 16 * 64 + word % 16 if WORD > 1 else k
        )  # a column; so said that masks hold for vectors of words
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            line = begin + tl.arange(0, LINES) * (BK // LINES)
            prefetch(w_row + (line // WORD)[None, :], (n[:, None] < out) & (line[None, :] < end), w)
        if SCALED:
            scale = tl.load(scales + n, mask=n < out, other=0.0)
        if PDL:
            tl.extra.cuda.gdc_wait()
        t1 = tl.arange(0, T1)
        first = tl.zeros((BN, T1), tl.float32)
        x1 = x + t1[:, None] * stride_x
        if T2:
            t2 = T1 + tl.arange(0, T2)
            second = tl.zeros((BN, T2), tl.float32)
            x2 = x + t2[:, None] * stride_x
        for at in range(begin, end, BK):
            inside, there = at + k < end, at + of_word < end
            tile = tl.load(w_row + (at // WORD + word)[None, :], mask=(n[:, None] < out) & there[None, :], other=0.0)
            tile = unpack(tile, x, INTEGER, ASM) if WORD > 1 else tile.to(x.dtype.element_ty)
            rows = tl.load(x1 + (at + k)[None, :], mask=(t1[:, None] < tokens) & inside[None, :], other=0.0)
            first = tl.dot(tile, tl.trans(rows), first, input_precision="ieee")
            if T2:
                rows = tl.load(x2 + (at + k)[None, :], mask=(t2[:, None] < tokens) & inside[None, :], other=0.0)
                second = tl.dot(tile, tl.trans(rows), second, input_precision="ieee")
        if SCALED:
            first *= scale[:, None]
            if T2:
                second *= scale[:, None]
        y += part.to(tl.int64) * tokens * out
        at1 = y + t1[None, :] * out + n[:, None]
        tl.store(at1, first.to(y.dtype.element_ty), mask=(t1[None, :] < tokens) & (n[:, None] < out))
        if T2:
            at2 = y + t2[None, :] * out + n[:, None]
            tl.store(at2, second.to(y.dtype.element_ty), mask=(t2[None, :] < tokens) & (n[:, None] < out))
