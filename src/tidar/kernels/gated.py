"""What a gated LoRA adds to a layer whose product holds both its own output and A x: one kernel instead of three."""

from __future__ import annotations

from torch import Tensor

from tidar.kernels.launch import tl, triton

TOKENS, COLUMNS, RANKS = 16, 128, 64
"""Tile of the output, and how much of the rank is multiplied at a time."""


def add_gated_eager(product: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """[T, O]: the first O columns of `product` [T, O + R], and gate [T, 1] x the others x b [O, R] transposed."""
    out = b.shape[0]
    return product[:, :out] + (product[:, out:] * gate) @ b.T


def add_gated(product: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """`add_gated_eager` by the kernel; rows of `product` are contiguous."""
    (tokens, _), (width, rank) = product.shape, b.shape
    out = product.new_empty(tokens, width)
    if tokens:
        _add_gated[(triton.cdiv(width, COLUMNS), triton.cdiv(tokens, TOKENS))](
            product,
            b,
            gate,
            out,
            tokens,
            width,
            product.stride(0),
            gate.stride(0),
            RANK=rank,
            RANKS=min(RANKS, max(16, triton.next_power_of_2(rank))),
            TOKENS=TOKENS,
            COLUMNS=COLUMNS,
            num_warps=4,
        )
    return out


if triton is not None:

    @triton.jit
    def _add_gated(
        product,
        b,
        gate,
        out,
        tokens,
        width,
        stride,
        gate_stride,
        RANK: tl.constexpr,
        RANKS: tl.constexpr,
        TOKENS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        known = token < tokens
        inside = known[:, None] & (column < width)[None, :]
        kind = out.dtype.element_ty
        row = product + token[:, None] * stride
        y = tl.load(row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        opened = tl.load(gate + token * gate_stride, mask=known, other=0.0)
        # A prompt's tiles have nothing but closed gates.
        if tl.max(opened.to(tl.float32)) > 0:
            for start in range(0, RANK, RANKS):
                r = start + tl.arange(0, RANKS)
                low = tl.load(row + width + r[None, :], mask=known[:, None] & (r < RANK)[None, :], other=0.0)
                low = (low * opened[:, None]).to(kind)
                at_b = b + column[None, :] * RANK + r[:, None]
                weight = tl.load(at_b, mask=(column < width)[None, :] & (r < RANK)[:, None], other=0.0)
                y = tl.dot(low, weight, y, input_precision="ieee")
        tl.store(out + token[:, None] * width + column[None, :], y.to(kind), mask=inside)
