"""Attention of one decode step: every slot sees its row's whole prefix, and the step's own slots by the layout's rule.

The keys of a row are its `lengths[b]` cached tokens followed by the step's N slots. Nearly all of that is the prefix,
which is visible to everyone, so it needs no mask; only key tiles that reach into the step's own slots evaluate

    enter[k] <= enter[q] < exit[k]

from two integers a token (see layout.py). The query heads of a group times the N slots are the rows of one matrix, so
keys are read once a group, and the keys are split among programs whose partial results a second kernel merges by their
log-sum-exp (flash-decoding).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar.kernels.launch import options, prefetch, processors, tl, triton
from tidar.layout import Layout

MOST_SPLITS = 32
TILE, KEYS, WARPS, STAGES = 64, 64, 4, 3


def step_attention_eager(query: Tensor, keys: Tensor, values: Tensor, layout: Layout, scale: float) -> Tensor:
    """Same result through a dense mask. See `step_attention` for shapes."""
    groups = query.shape[2] // keys.shape[1]
    rows = query.transpose(1, 2)
    k, v = (x.repeat_interleave(groups, 1) for x in (keys, values))
    mask = layout.dense_mask(keys.shape[2])
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def step_attention(query: Tensor, keys: Tensor, values: Tensor, layout: Layout, scale: float) -> Tensor:
    """Attention of a step's slots over the cache that already holds their own keys and values.

    Args:
        query: [B, N, H, D], contiguous, rotated.
        keys, values: [B, H_kv, capacity, D]; slot s of row b holds its token s, for s < layout.prefix[b] + N.
        layout: the step's layout, with the prefix lengths.
        scale: factor of the scores, usually 1 / sqrt(D).

    Returns:
        [B, N, H, D] in query's dtype.
    """
    batch, slots, heads, dim = query.shape
    kv_heads = keys.shape[1]
    groups = heads // kv_heads
    rows = groups * slots
    tile = min(TILE, max(16, triton.next_power_of_2(rows)))
    tiles = triton.cdiv(rows, tile)
    # Static, so that a captured graph fits every prefix length: about a program a processor, none below 64 keys.
    room = max(1, triton.cdiv(keys.shape[2], 64))
    wanted = processors(query.device) * 4 // (3 * batch * kv_heads * tiles)
    splits = 1 << max(0, min(MOST_SPLITS, room, wanted).bit_length() - 1)
    out = torch.empty_like(query)
    partial = query.new_empty(batch * kv_heads, splits, rows, dim, dtype=torch.float32) if splits > 1 else out
    lse = query.new_empty(batch * kv_heads, splits, rows, dtype=torch.float32) if splits > 1 else partial
    shape = {"G": groups, "HKV": kv_heads, "D": dim, "DP": triton.next_power_of_2(dim), "SPLITS": splits}
    _split[(tiles, batch * kv_heads, splits)](
        query,
        keys,
        values,
        layout.prefix,
        layout.enter,
        layout.exit,
        partial,
        lse,
        slots,
        scale * math.log2(math.e),
        layout.enter.stride(0),
        keys.stride(0),
        keys.stride(1),
        R=tile,
        S=KEYS,
        EXACT=query.dtype == torch.float32,
        num_warps=WARPS if tile > 32 else 4,
        num_stages=STAGES,
        **shape,
        **options(query.device),
    )
    if splits > 1:
        _merge[(batch * slots, heads)](partial, lse, out, slots, num_warps=1, **shape, **options(query.device))
    return out


if triton is not None:

    @triton.jit
    def _split(
        q,
        keys,
        values,
        prefix,
        enter,
        exit,
        partial,
        lse,
        slots,
        scale,
        stride_node,
        stride_row,
        stride_head,
        R: tl.constexpr,
        S: tl.constexpr,
        EXACT: tl.constexpr,
        G: tl.constexpr,
        HKV: tl.constexpr,
        D: tl.constexpr,
        DP: tl.constexpr,
        SPLITS: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """One tile of rows (row = group * slots + slot) over one part of a row's keys."""
        head_of_row = tl.program_id(1)
        b, h = head_of_row // HKV, head_of_row % HKV
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        rows = tl.program_id(0) * R + tl.arange(0, R)
        real = rows < G * slots
        slot, group = rows % slots, rows // slots
        d = tl.arange(0, DP)
        length = tl.load(prefix + b).to(tl.int32)
        total = length + slots
        share = tl.cdiv(tl.cdiv(total, S), SPLITS) * S
        begin = tl.program_id(2) * share
        end = tl.minimum(begin + share, total)
        unmasked = tl.minimum(tl.maximum(length // S * S, begin), end)
        base = b.to(tl.int64) * stride_row + h.to(tl.int64) * stride_head
        k_base, v_base = keys + base, values + base
        node = tl.load(enter + b * stride_node + slot, mask=real, other=0)
        if PDL:
            # The prefix was there before this step.
            lines: tl.constexpr = (DP + 63) // 64
            line = tl.arange(0, lines) * 64
            first = (begin + tl.arange(0, S))[:, None].to(tl.int64) * D + line[None, :]
            cached = ((begin + tl.arange(0, S)) < unmasked)[:, None] & (line < D)[None, :]
            prefetch(k_base + first, cached, k_base)
            prefetch(v_base + first, cached, v_base)
            tl.extra.cuda.gdc_wait()
        at_q = ((b * slots + slot) * (HKV * G) + h * G + group)[:, None] * D + d[None, :]
        tile = tl.load(q + at_q, mask=real[:, None] & (d[None, :] < D), other=0.0)
        peak = tl.full((R,), float("-inf"), tl.float32)
        total_weight = tl.zeros((R,), tl.float32)
        acc = tl.zeros((R, DP), tl.float32)
        for at in range(begin, unmasked, S):
            s = at + tl.arange(0, S)
            place = s[:, None].to(tl.int64) * D + d[None, :]
            key = tl.load(k_base + place, mask=d[None, :] < D, other=0.0)
            value = tl.load(v_base + place, mask=d[None, :] < D, other=0.0)
            if EXACT:
                score = tl.dot(tile, tl.trans(key), input_precision="ieee") * scale
            else:
                score = tl.dot(tile, tl.trans(key)) * scale
            top = tl.maximum(peak, tl.max(score, 1))
            weight = tl.exp2(score - top[:, None])
            keep = tl.exp2(peak - top)
            total_weight = total_weight * keep + tl.sum(weight, 1)
            if EXACT:
                acc = acc * keep[:, None] + tl.dot(weight, value, input_precision="ieee")
            else:
                acc = acc * keep[:, None] + tl.dot(weight.to(value.dtype), value)
            peak = top
        for at in range(unmasked, end, S):
            s = at + tl.arange(0, S)
            place = s[:, None].to(tl.int64) * D + d[None, :]
            inside = (s < total)[:, None] & (d[None, :] < D)
            key = tl.load(k_base + place, mask=inside, other=0.0)
            value = tl.load(v_base + place, mask=inside, other=0.0)
            if EXACT:
                score = tl.dot(tile, tl.trans(key), input_precision="ieee") * scale
            else:
                score = tl.dot(tile, tl.trans(key)) * scale
            own = s - length
            known = (own >= 0) & (own < slots)
            opens = tl.load(enter + b * stride_node + own, mask=known, other=0)
            closes = tl.load(exit + b * stride_node + own, mask=known, other=0)
            descends = (opens[None, :] <= node[:, None]) & (node[:, None] < closes[None, :])
            score = tl.where((own < 0)[None, :] | (known[None, :] & descends), score, float("-inf"))
            top = tl.maximum(peak, tl.max(score, 1))
            safe = tl.where(top == float("-inf"), 0.0, top)
            weight = tl.exp2(score - safe[:, None])
            keep = tl.exp2(peak - safe)
            total_weight = total_weight * keep + tl.sum(weight, 1)
            if EXACT:
                acc = acc * keep[:, None] + tl.dot(weight, value, input_precision="ieee")
            else:
                acc = acc * keep[:, None] + tl.dot(weight.to(value.dtype), value)
            peak = top
        acc = acc / tl.where(total_weight == 0, 1.0, total_weight)[:, None]
        fits = real[:, None] & (d[None, :] < D)
        if SPLITS == 1:
            tl.store(partial + at_q, acc.to(partial.dtype.element_ty), mask=fits)
        else:
            row = (head_of_row * SPLITS + tl.program_id(2)) * (G * slots) + rows
            tl.store(partial + row[:, None].to(tl.int64) * D + d[None, :], acc, mask=fits)
            tl.store(lse + row, tl.where(total_weight == 0, float("-inf"), peak + tl.log2(total_weight)), mask=real)

    @triton.jit
    def _merge(
        partial,
        lse,
        out,
        slots,
        G: tl.constexpr,
        HKV: tl.constexpr,
        D: tl.constexpr,
        DP: tl.constexpr,
        SPLITS: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """One slot's one head: the parts weighted by what each part's keys weigh."""
        token, head = tl.program_id(0), tl.program_id(1)
        b, slot = token // slots, token % slots
        h, group = head // G, head % G
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        part = tl.arange(0, SPLITS)
        row = ((b * HKV + h) * SPLITS + part) * (G * slots) + group * slots + slot
        weight = tl.load(lse + row)
        weight = tl.exp2(weight - tl.max(weight, 0))
        d = tl.arange(0, DP)
        parts = tl.load(partial + row[:, None].to(tl.int64) * D + d[None, :], mask=d[None, :] < D, other=0.0)
        # A part without keys has weight zero.
        merged = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
        tl.store(out + (token * (HKV * G) + head) * D + d, merged.to(out.dtype.element_ty), mask=d < D)
