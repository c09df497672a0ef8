"""Residual sum and RMS norm between two linear layers: h += y (+ LoRA on masks); x = h / rms(h) * weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tidar.kernels.launch import options, tl, triton


class LowRank(NamedTuple):
    """A gated LoRA whose A lies under a base projection: the projection's columns from `start` on are A(x).

    b is [R, N], the transposed and already scaled B; token t of a row of `slots` is a mask if t >= clean.
    """

    b: Tensor
    start: int


def add_norm_eager(
    hidden: Tensor,
    partial: Tensor | None,
    weight: Tensor,
    eps: float,
    low_rank: LowRank | None,
    slots: int,
    clean: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `add_norm`; every product is rounded where a stock model rounds it."""
    if partial is not None:
        width = hidden.shape[1]
        y = summed(partial)
        delta = y[:, :width] if bias is None else y[:, :width] + bias.float()
        if low_rank is not None:
            delta = delta + masked_delta(y, low_rank, slots, clean)
        hidden = (hidden.float() + delta).to(hidden.dtype)
    h = hidden.float()
    x = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(hidden.dtype)
    return hidden, weight * x


def summed(partial: Tensor) -> Tensor:
    """[T, N] float32 from partial sums [split, T, N]."""
    return partial.float().sum(0)


def masked_delta(y: Tensor, low_rank: LowRank, slots: int, clean: int) -> Tensor:
    """[T, N] LoRA term, zero on clean tokens, from a projection [T, N + R] that carries A(x)."""
    rank = low_rank.b.shape[0]
    delta = y[:, low_rank.start : low_rank.start + rank] @ low_rank.b.float()
    masks = torch.arange(len(y), device=y.device) % slots >= clean
    return delta * masks[:, None]


def add_norm(
    hidden: Tensor,
    partial: Tensor | None,
    weight: Tensor,
    eps: float,
    low_rank: LowRank | None,
    slots: int,
    clean: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a projection to the residual stream and normalise the sum.

    Args:
        hidden: [T, H] residual stream.
        partial: [split, T, H + R] partial sums of the projection (see linear.py), or None to normalise only.
        weight: [H] of the norm.
        low_rank: the projection's LoRA, if it has one.
        slots, clean: tokens a row, and how many of them come before its masks.
        bias: [H] of the projection.

    Returns:
        the new residual stream and its normalised form, both [T, H].
    """
    tokens, width = hidden.shape
    if low_rank is not None and partial is not None and clean < slots:
        # A matrix product wants tiles of tokens, a norm wants whole rows: two kernels.
        hidden, partial, bias = _residual_sum(hidden, partial, low_rank, slots, clean, bias), None, None
    out, normed = torch.empty_like(hidden) if partial is not None else hidden, torch.empty_like(hidden)
    block = triton.next_power_of_2(width)
    _add_norm[(tokens,)](
        hidden,
        partial if partial is not None else hidden,
        weight,
        bias if bias is not None else weight,
        out,
        normed,
        width,
        partial.shape[2] if partial is not None else 0,
        eps,
        tokens,
        SPLIT=partial.shape[0] if partial is not None else 0,
        BIAS=bias is not None,
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
        **options(hidden.device),
    )
    return out, normed


def _residual_sum(
    hidden: Tensor, partial: Tensor, low_rank: LowRank, slots: int, clean: int, bias: Tensor | None
) -> Tensor:
    """hidden + projection (+ bias) + LoRA on masks, [T, H]."""
    tokens, width = hidden.shape
    out = torch.empty_like(hidden)
    rank = low_rank.b.shape[0]
    _residual[(triton.cdiv(width, 128), triton.cdiv(tokens, 16))](
        hidden,
        partial,
        bias if bias is not None else hidden,
        low_rank.b,
        out,
        width,
        partial.shape[2],
        low_rank.start,
        slots,
        clean,
        tokens,
        SPLIT=partial.shape[0],
        RANK=rank,
        RP=max(16, triton.next_power_of_2(rank)),
        TILE=16,
        BLOCK=128,
        BIAS=bias is not None,
        num_warps=4,
        **options(hidden.device),
    )
    return out


if triton is not None:

    @triton.jit
    def _residual(
        hidden,
        partial,
        bias,
        lora_b,
        out,
        width,
        stride,
        start,
        slots,
        clean,
        tokens,
        SPLIT: tl.constexpr,
        RANK: tl.constexpr,
        RP: tl.constexpr,
        TILE: tl.constexpr,
        BLOCK: tl.constexpr,
        BIAS: tl.constexpr,
        PDL: tl.constexpr,
    ):
        token = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        known = token < tokens
        inside = known[:, None] & (column < width)[None, :]
        kind = out.dtype.element_ty
        r = tl.arange(0, RP)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        real_b = (r < RANK)[:, None] & (column < width)[None, :]
        b = tl.load(lora_b + r[:, None] * width + column[None, :], mask=real_b, other=0.0)
        if PDL:
            tl.extra.cuda.gdc_wait()
        delta = tl.zeros((TILE, BLOCK), tl.float32)
        a = tl.zeros((TILE, RP), tl.float32)
        row = partial + token[:, None] * stride
        real_a = (known & (token % slots >= clean))[:, None] & (r < RANK)[None, :]
        for part in tl.static_range(SPLIT):
            at = row + part * tokens * stride
            delta += tl.load(at + column[None, :], mask=inside, other=0.0).to(tl.float32)
            a += tl.load(at + start + r[None, :], mask=real_a, other=0.0).to(tl.float32)
        if BIAS:
            delta += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        delta = tl.dot(a.to(kind), b, delta, input_precision="ieee")
        place = token[:, None] * width + column[None, :]
        h = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, (h + delta).to(kind), mask=inside)

    @triton.jit
    def _add_norm(
        hidden,
        partial,
        weight,
        bias,
        out,
        normed,
        width,
        stride,
        eps,
        tokens,
        SPLIT: tl.constexpr,
        BIAS: tl.constexpr,
        BLOCK: tl.constexpr,
        PDL: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        scale = tl.load(weight + column, mask=inside, other=0.0)
        if PDL:
            tl.extra.cuda.gdc_wait()
        h = tl.load(hidden + token * width + column, mask=inside, other=0.0)
        kind = h.dtype
        h = h.to(tl.float32)
        if SPLIT:
            y = partial + token * stride
            delta = tl.zeros((BLOCK,), tl.float32)
            for part in tl.static_range(SPLIT):
                delta += tl.load(y + part * tokens * stride + column, mask=inside, other=0.0).to(tl.float32)
            if BIAS:
                delta += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
            h = (h + delta).to(kind).to(tl.float32)
            tl.store(out + token * width + column, h.to(kind), mask=inside)
        x = (h * tl.rsqrt(tl.sum(h * h, 0) / width + eps)).to(kind)
        tl.store(normed + token * width + column, (x * scale).to(kind), mask=inside)
