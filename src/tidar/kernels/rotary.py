"""Between the qkv projection and attention: bias, LoRA, per-head norm, rotary embedding, and the write to the cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tidar.kernels.launch import options, tl, triton
from tidar.kernels.norm import LowRank, masked_delta, summed


class Heads(NamedTuple):
    """Shape of an attention layer and what it does to its heads.

    bias is [(H + 2 H_kv) D] of the fused projection; q_norm and k_norm are [D] RMS norm weights; all may be None.
    """

    query: int
    kv: int
    dim: int
    bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 1e-6


def rotate_eager(
    partial: Tensor,
    heads: Heads,
    low_rank: LowRank | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    slots: int,
    clean: int,
) -> Tensor:
    """See `rotate`."""
    y = summed(partial)
    width = (heads.query + 2 * heads.kv) * heads.dim
    qkv = y[:, :width]
    if heads.bias is not None:
        qkv = qkv + heads.bias.float()
    if low_rank is not None:
        qkv = qkv + masked_delta(y, low_rank, slots, clean)
    kind = keys.dtype
    shaped = qkv.to(kind).view(len(lengths), slots, -1, heads.dim)
    q, k, v = shaped.split((heads.query, heads.kv, heads.kv), 2)
    q, k = (_norm(x, w, heads.eps) for x, w in ((q, heads.q_norm), (k, heads.k_norm)))
    q, k = (_turn(x, cos, sin) for x in (q, k))
    rows = torch.arange(len(lengths), device=y.device)[:, None]
    at = lengths[:, None] + torch.arange(slots, device=y.device)
    keys[rows, :, at], values[rows, :, at] = k, v
    return q.contiguous()


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    f = x.float()
    return weight * (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat((-high, low), -1) * sin[:, :, None]


def rotate(
    partial: Tensor,
    heads: Heads,
    low_rank: LowRank | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    slots: int,
    clean: int,
) -> Tensor:
    """Queries [B, slots, H, D] of a step; its keys and values go to cache slots lengths[b] .. lengths[b] + slots - 1.

    Args:
        partial: [split, B * slots, (H + 2 H_kv) D + R] partial sums of the fused projection.
        low_rank: its LoRA: A(x) of q, k and v in that order, R / 3 columns each; b is [R, (H + 2 H_kv) D].
        cos, sin: [B, slots, D] of the rotary embedding, both halves alike.
        keys, values: [B, H_kv, capacity, D], written in place.
        lengths: [B] tokens in the cache.
        slots, clean: tokens a row, and how many of them come before its masks.
    """
    split, tokens, stride = partial.shape
    out = keys.new_empty(len(lengths), slots, heads.query, heads.dim)
    some = heads.q_norm if heads.q_norm is not None else cos
    _rotate[(tokens, heads.query + 2 * heads.kv)](
        partial,
        heads.bias if heads.bias is not None else cos,
        low_rank.b if low_rank is not None else cos,
        some,
        heads.k_norm if heads.k_norm is not None else cos,
        cos,
        sin,
        out,
        keys,
        values,
        lengths,
        stride,
        low_rank.start if low_rank is not None else 0,
        heads.eps,
        keys.stride(0),
        keys.stride(1),
        slots,
        clean,
        tokens,
        H=heads.query,
        HKV=heads.kv,
        D=heads.dim,
        HALF=triton.next_power_of_2(heads.dim // 2),
        SPLIT=split,
        RANK=low_rank.b.shape[0] // 3 if low_rank is not None and clean < slots else 0,
        BIAS=heads.bias is not None,
        NORM=heads.q_norm is not None,
        num_warps=1,
        **options(partial.device),
    )
    return out


if triton is not None:

    @triton.jit
    def _rotate(
        partial,
        bias,
        lora_b,
        q_norm,
        k_norm,
        cos,
        sin,
        out,
        keys,
        values,
        lengths,
        stride,
        start,
        eps,
        stride_row,
        stride_head,
        slots,
        clean,
        tokens,
        H: tl.constexpr,
        HKV: tl.constexpr,
        D: tl.constexpr,
        HALF: tl.constexpr,
        SPLIT: tl.constexpr,
        RANK: tl.constexpr,
        BIAS: tl.constexpr,
        NORM: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """One head of one token, as two halves, because rotation pairs element d with d + D / 2."""
        token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        b, slot = token // slots, token % slots
        d = tl.arange(0, HALF)
        inside = d < D // 2
        column = head * D + d
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        kind = keys.dtype.element_ty
        y = partial + token * stride
        low = tl.zeros((HALF,), tl.float32)
        high = tl.zeros((HALF,), tl.float32)
        for part in tl.static_range(SPLIT):
            at = y + part * tokens * stride + column
            low += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            high += tl.load(at + D // 2, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            low += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
            high += tl.load(bias + column + D // 2, mask=inside, other=0.0).to(tl.float32)
        if RANK:
            if slot >= clean:
                which = (head >= H).to(tl.int32) + (head >= H + HKV).to(tl.int32)
                for r in tl.static_range(RANK):
                    a = 0.0
                    for part in tl.static_range(SPLIT):
                        a += tl.load(y + part * tokens * stride + start + which * RANK + r).to(tl.float32)
                    at_b = lora_b + (which * RANK + r) * ((H + 2 * HKV) * D) + column
                    low += a * tl.load(at_b, mask=inside, other=0.0).to(tl.float32)
                    high += a * tl.load(at_b + D // 2, mask=inside, other=0.0).to(tl.float32)
        low = low.to(kind).to(tl.float32)
        high = high.to(kind).to(tl.float32)
        place = tl.load(lengths + b) + slot
        if head >= H + HKV:
            to = values + b * stride_row + (head - H - HKV).to(tl.int64) * stride_head + place * D + d
            tl.store(to, low.to(kind), mask=inside)
            tl.store(to + D // 2, high.to(kind), mask=inside)
        else:
            if NORM:
                weight = tl.where(head < H, q_norm, k_norm)
                inverse = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / D + eps)
                scale_low = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
                scale_high = tl.load(weight + d + D // 2, mask=inside, other=0.0).to(tl.float32)
                low = ((low * inverse).to(kind).to(tl.float32) * scale_low).to(kind).to(tl.float32)
                high = ((high * inverse).to(kind).to(tl.float32) * scale_high).to(kind).to(tl.float32)
            c = tl.load(cos + token * D + d, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + token * D + d, mask=inside, other=0.0).to(tl.float32)
            # Rounded after each product, as eager code in this dtype does.
            first = (low * c).to(kind).to(tl.float32) - (high * s).to(kind).to(tl.float32)
            second = (high * c).to(kind).to(tl.float32) + (low * s).to(kind).to(tl.float32)
            if head < H:
                to = out + (token * H + head) * D + d
            else:
                to = keys + b * stride_row + (head - H).to(tl.int64) * stride_head + place * D + d
            tl.store(to, first.to(kind), mask=inside)
            tl.store(to + D // 2, second.to(kind), mask=inside)
