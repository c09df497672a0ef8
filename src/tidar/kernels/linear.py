"""A linear layer over few rows (1 to a few hundred): bound by reading the weights, so it is built around that stream.

The weight tile is the tall operand of the matrix product and the rows are its narrow one, in one or two accumulators
(64 + 16 rows for 72 slots, 256 + 16 for 272), because tensor-core tiles are powers of two and slots are not. The first
weight tiles are fetched into L2 before the kernel waits for its input. Weights of eight bits (see weights.py) become
x's dtype on their way to the tensor cores, which is exact, and the sums are multiplied by their row's scale.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar.kernels.launch import options, prefetch, processors, programs_for, stages_for, tl, triton
from tidar.kernels.weights import BLOCK, QuantWeight, unpack, unpacking

CACHE_LINE = 128
"""Bytes that are fetched together."""
MOST_SPLITS = 8
"""Programs that share a row of weights, at most."""


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
        tiling = choose(tokens, out, inner, scale is not None, x.device)
    if tiling is None:
        if unrounded and x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, weight.to(x.dtype).t(), out_dtype=torch.float32)[None]
        return linear_eager(x, weight)
    first, second = tile_rows(tokens, scale is not None)
    words = isinstance(weight, QuantWeight) and weight.interleaved
    numbers = values.view(torch.int32) if words else values
    if words and tiling.columns % BLOCK:
        raise ValueError(f"{tiling.columns} columns a step, but numbers are interleaved by {BLOCK}")
    tile = tile_bytes(tiling, tokens, values.element_size(), x.element_size())
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


def tile_rows(tokens: int, numbers: bool = False) -> tuple[int, int]:
    """The two accumulators' widths (powers of two, at least 16; the second may be 0) that hold `tokens` rows.

    Where weights are `numbers`, two narrow products take a fifth longer than a wide one that is cut alike.
    """
    if numbers and 32 < tokens <= 64:
        return 64, 0
    for total in range(-(-tokens // 16) * 16, 1025, 16):
        first = 1 << (total.bit_length() - 1)
        rest = total - first
        if rest == 0 or (rest >= 16 and rest & (rest - 1) == 0):
            return first, rest
    raise ValueError(f"{tokens} rows are too many for one tile")


def tile_bytes(tiling: Tiling, tokens: int, weight_size: int, x_size: int = 2) -> int:
    """Shared memory that a loop step's tiles of weights and rows take, by the bytes of a number of each."""
    return tiling.columns * (tiling.rows * weight_size + sum(tile_rows(tokens, weight_size == 1)) * x_size)


_PLAIN = (
    (16, (Tiling(64, 128, 1, 4, 6), Tiling(64, 128, 1, 4, 3))),
    (128, (Tiling(64, 128, 1, 4, 4),)),
)
"""The cuts that were fastest for up to so many tokens, still undivided (results/linear-h200.json)."""
_NUMBERS = (
    (16, (Tiling(64, 256, 1, 4, 4), Tiling(64, 128, 1, 4, 6))),
    (32, (Tiling(64, 128, 1, 4, 6), Tiling(128, 128, 1, 8, 3))),
    (64, (Tiling(64, 128, 1, 4, 4), Tiling(64, 128, 1, 4, 3))),
    (96, (Tiling(64, 128, 1, 4, 3), Tiling(64, 64, 1, 4, 5))),
    (128, (Tiling(128, 128, 1, 8, 4),)),
    (272, (Tiling(128, 64, 1, 8, 4),)),
)
"""The same for weights of eight bits."""


@functools.lru_cache(1024)
def choose(tokens: int, out: int, inner: int, numbers: bool, device: torch.device) -> Tiling | None:
    """A tiling by what was measured; None for large products, where cuBLAS is as fast (numbers multiplied out first).

    What decides is whether the programs, several of which share a multiprocessor, fill the GPU at once: if part of it
    is idle in the end, a third of the time can go there. So weights are divided among programs by rows and by columns.
    """
    cuts = next((cuts for most, cuts in (_NUMBERS if numbers else _PLAIN) if tokens <= most), None)
    if cuts is None or (not numbers and tokens > 16 and out > 128 * 64):
        return None
    width, best, least = 1 if numbers else 2, None, math.inf
    for cut in cuts:
        together = programs_for(device, cut.stages, tile_bytes(cut, tokens, width))
        steps = -(-inner // cut.columns)
        for split in range(1, max(1, min(MOST_SPLITS, steps // 2)) + 1):
            rounds = -(-out // cut.rows) * split / (processors(device) * together)
            used = rounds / math.ceil(rounds) * steps / (split * -(-steps // split))
            if rounds > 1:  # they begin one by one, which others on the same multiprocessor can hide
                used *= 0.75 if together > 1 else 0.5
            # Picoseconds a row of weights, at 4 TB/s or 500 TFLOP/s, and its partial sums', which stay in L2.
            time = inner * max(width / 4, tokens / 250) / used
            if split > 1 and tokens > 16:
                time += tokens * (split - 0.5) / 2
            if time * 1.04 < least:  # the first cuts and the fewest parts, unless more gain something
                best, least = cut._replace(split=split), time
    return best


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
