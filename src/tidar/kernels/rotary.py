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
    rank = low_rank.b.shape[0] // 3 if low_rank is not None and clean < slots else 0
    tile = 16 if rank else 4 if tokens > 16 else 1
    _rotate[(triton.cdiv(tokens, tile), heads.query + 2 * heads.kv)](
        partial,
        heads.bias if heads.bias is not None else cos,
        low_rank.b if low_rank is not None else cos,
        heads.q_norm if heads.q_norm is not None else cos,
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
        RANK=rank,
        RP=max(16, triton.next_power_of_2(rank)),
        TILE=tile,
        BIAS=heads.bias is not None,
        NORM=heads.q_norm is not None,
        num_warps=4 if rank else 1,
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
        RP: tl.constexpr,
        TILE: tl.constexpr,
        BIAS: tl.constexpr,
        NORM: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """One head of a tile of tokens, as two halves, because rotation pairs element d with d + D / 2."""
        token, head = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE), tl.program_id(1)
        known = token < tokens
        b, slot = token // slots, token % slots
        d = tl.arange(0, HALF)
        real = d < D // 2
        inside = known[:, None] & real[None, :]
        column = head * D + d
        kind = keys.dtype.element_ty
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        if RANK:
            which = (head >= H).to(tl.int32) + (head >= H + HKV).to(tl.int32)
            r = tl.arange(0, RP)
            at_b = lora_b + (which * RANK + r)[:, None] * ((H + 2 * HKV) * D) + column[None, :]
            real_b = (r < RANK)[:, None] & real[None, :]
            b_low = tl.load(at_b, mask=real_b, other=0.0)
            b_high = tl.load(at_b + D // 2, mask=real_b, other=0.0)
        if PDL:
            tl.extra.cuda.gdc_wait()
        row = partial + token[:, None] * stride
        low = tl.zeros((TILE, HALF), tl.float32)
        high = tl.zeros((TILE, HALF), tl.float32)
        for part in tl.static_range(SPLIT):
            at = row + part * tokens * stride + column[None, :]
            low += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            high += tl.load(at + D // 2, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            low += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
            high += tl.load(bias + column + D // 2, mask=real, other=0.0).to(tl.float32)[None, :]
        if RANK:
            a = tl.zeros((TILE, RP), tl.float32)
            real_a = (known & (slot >= clean))[:, None] & (r < RANK)[None, :]
            for part in tl.static_range(SPLIT):
                at_a = row + part * tokens * stride + start + which * RANK + r[None, :]
                a += tl.load(at_a, mask=real_a, other=0.0).to(tl.float32)
            low = tl.dot(a.to(kind), b_low, low, input_precision="ieee")
            high = tl.dot(a.to(kind), b_high, high, input_precision="ieee")
        low = low.to(kind).to(tl.float32)
        high = high.to(kind).to(tl.float32)
        place = tl.load(lengths + b, mask=known, other=0) + slot
        if head >= H + HKV:
            start_of = b * stride_row + (head - H - HKV).to(tl.int64) * stride_head + place * D
            to = values + start_of[:, None] + d[None, :]
            tl.store(to, low.to(kind), mask=inside)
            tl.store(to + D // 2, high.to(kind), mask=inside)
        else:
            if NORM:
                weight = k_norm
                if head < H:
                    weight = q_norm
                inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)[:, None]
                scale_low = tl.load(weight + d, mask=real, other=0.0).to(tl.float32)[None, :]
                scale_high = tl.load(weight + d + D // 2, mask=real, other=0.0).to(tl.float32)[None, :]
                low = ((low * inverse).to(kind).to(tl.float32) * scale_low).to(kind).to(tl.float32)
                high = ((high * inverse).to(kind).to(tl.float32) * scale_high).to(kind).to(tl.float32)
            turn = token[:, None] * D + d[None, :]
            c = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
            # Rounded after each product, as eager code in this dtype does.
            first = (low * c).to(kind).to(tl.float32) - (high * s).to(kind).to(tl.float32)
            second = (high * c).to(kind).to(tl.float32) + (low * s).to(kind).to(tl.float32)
            if head < H:
                to = out + (token[:, None] * H + head) * D + d[None, :]
            else:
                start_of = b * stride_row + (head - H).to(tl.int64) * stride_head + place * D
                to = keys + start_of[:, None] + d[None, :]
            tl.store(to, first.to(kind), mask=inside)
            tl.store(to + D // 2, second.to(kind), mask=inside)
