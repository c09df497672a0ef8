"""Attention of a step over a paged KV cache: requests lie one after another, each behind its own pages of keys.

The same as `attention.py` (a prefix that everybody sees, then the step's own slots by enter and exit; keys split among
programs, merged by log-sum-exp) for caches in which a request's keys are blocks anywhere in memory, as vLLM keeps them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar.kernels.attention import _fold, _visible, _weigh, plan_for
from tidar.kernels.launch import tl, triton
from tidar.layout import descends

MOST_KEYS = 4096
"""Splits are planned for prefixes of at most so many tokens; longer ones work as well, with longer parts."""


def paged_attention_eager(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    starts: Tensor,
    requests: Tensor,
    enter: Tensor,
    exit_: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """Same result request by request, through dense masks. See `paged_attention`; `slots` follows from `starts`."""
    bounds, known = starts.tolist(), lengths.tolist()
    for request in requests.tolist():
        first, last, length = bounds[request], bounds[request + 1], known[request]
        if first == last:
            continue
        place = torch.arange(length, device=table.device)
        page, offset = table[request, place // keys.shape[1]].long(), place % keys.shape[1]
        k, v = (pages[page, offset].transpose(0, 1) for pages in (keys, values))
        own = descends(enter[first:last, None], enter[first:last], exit_[first:last])
        mask = F.pad(own, (length - len(own), 0), value=True)
        rows = query[first:last].transpose(0, 1)
        result = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        out[first:last] = result.transpose(0, 1).reshape(out[first:last].shape)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    starts: Tensor,
    requests: Tensor,
    enter: Tensor,
    exit_: Tensor,
    scale: float,
    out: Tensor,
    slots: int,
    most_keys: int = MOST_KEYS,
) -> None:
    """Attention of some requests' tokens, whose own keys and values are in the cache already.

    Args:
        query: [T, H, D], rotated.
        keys, values: [blocks, block size, H_kv, D], any strides but the last.
        table: [R, most blocks] int32, each request's blocks in order.
        lengths: [R] int32, tokens of a request with those of this step.
        starts: [R + 1] int32, where each request's tokens begin.
        requests: [n] int32, which of them; at most `slots` tokens each, others' output is left alone.
        enter, exit_: [T] int32, nodes within each request (see layout.py).
        scale: factor of the scores.
        out: [T, H * D] or [T, H, D], contiguous; written.
        slots, most_keys: of the largest request; graphs are captured for both.
    """
    heads, dim = query.shape[1:]
    page, kv_heads = keys.shape[1:3]
    groups, pairs = heads // kv_heads, len(requests) * kv_heads
    rows = groups * slots
    plan = plan_for(rows, pairs, min(most_keys, MOST_KEYS), query)
    partial, lse = out, out
    if plan.splits > 1:
        partial = query.new_empty(pairs, plan.splits, rows, dim, dtype=torch.float32)
        lse = query.new_empty(pairs, plan.splits, rows, dtype=torch.float32)
    shape = {"G": groups, "HKV": kv_heads, "D": dim, "DP": triton.next_power_of_2(dim)}
    _split[(triton.cdiv(rows, plan.tile), pairs, plan.splits)](
        query,
        keys,
        values,
        table,
        lengths,
        starts,
        requests,
        enter,
        exit_,
        partial,
        lse,
        slots,
        plan.splits,
        scale * math.log2(math.e),
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        table.stride(0),
        WHOLE=plan.splits == 1,
        PAGE=page,
        R=plan.tile,
        S=plan.keys,
        GRAIN=plan.grain,
        STAGES=plan.stages,
        num_warps=4,
        **shape,
    )
    if plan.splits > 1:
        _merge[(triton.cdiv(rows, 4), pairs)](
            partial,
            lse,
            out,
            lengths,
            starts,
            requests,
            slots,
            R=4,
            SPLITS=plan.splits,
            GRAIN=plan.grain,
            num_warps=4,
            **shape,
        )


if triton is not None:

    @triton.jit(do_not_specialize=["slots", "splits"])
    def _split(
        q,
        keys,
        values,
        table,
        lengths,
        starts,
        requests,
        enter,
        exit,
        partial,
        lse,
        slots,
        splits,
        scale,
        stride_token,
        stride_head,
        stride_page,
        stride_place,
        stride_kv_head,
        stride_table,
        WHOLE: tl.constexpr,
        PAGE: tl.constexpr,
        R: tl.constexpr,
        S: tl.constexpr,
        GRAIN: tl.constexpr,
        STAGES: tl.constexpr,
        G: tl.constexpr,
        HKV: tl.constexpr,
        D: tl.constexpr,
        DP: tl.constexpr,
    ):
        """One tile of rows (row = slot * group size + head in the group) over one part of a request's keys."""
        pair, part = tl.program_id(1), tl.program_id(2)
        request, h = tl.load(requests + pair // HKV), pair % HKV
        first = tl.load(starts + request)
        count = tl.load(starts + request + 1) - first
        known = tl.load(lengths + request)
        rows = tl.program_id(0) * R + tl.arange(0, R)
        slot, group = rows // G, rows % G
        real = rows < G * count
        s, d = tl.arange(0, S), tl.arange(0, DP)
        old = known - count
        share = tl.cdiv(tl.cdiv(known, GRAIN), splits) * GRAIN
        begin = tl.minimum(part * share, known)
        end = tl.minimum(begin + share, known)
        node = tl.load(enter + first + slot, mask=real, other=0)
        at_q = (first + slot)[:, None] * stride_token + (h * G + group)[:, None] * stride_head + d[None, :]
        fits = real[:, None] & (d[None, :] < D)
        tile = tl.load(q + at_q, mask=fits, other=0.0)
        peak = tl.full((R,), float("-inf"), tl.float32)
        total = tl.zeros((R,), tl.float32)
        acc = tl.zeros((R, DP), tl.float32)
        pages = table + request.to(tl.int64) * stride_table
        for at in tl.range(begin, end, S, num_stages=STAGES):
            place = at + s
            held = place < end
            block = tl.load(pages + place // PAGE, mask=held, other=0).to(tl.int64)
            line = block * stride_page + (place % PAGE) * stride_place + h * stride_kv_head
            inside = held[:, None] & (d[None, :] < D)
            key = tl.load(keys + line[:, None] + d[None, :], mask=inside, other=0.0)
            value = tl.load(values + line[:, None] + d[None, :], mask=inside, other=0.0)
            score = tl.dot(tile, tl.trans(key), input_precision="ieee")
            if at + S > tl.minimum(old, end):
                own = place - old
                mine = (own >= 0) & held
                opens = tl.load(enter + first + own, mask=mine, other=0)
                closes = tl.load(exit + first + own, mask=mine, other=0)
                score = _visible(score, opens, tl.where(held & (own < 0), 0x7FFFFFFF, closes), node)
            peak, total, acc = _fold(score, value, peak, total, acc, scale)
        acc = acc * (1.0 / tl.where(total == 0, 1.0, total))[:, None]
        if WHOLE:
            at_out = ((first + slot) * (HKV * G) + h * G + group)[:, None] * D + d[None, :]
            tl.store(partial + at_out, acc.to(partial.dtype.element_ty), mask=fits)
        else:
            filled = rows < tl.where(part * share < known, G * count, 0)
            start = (pair * splits + part).to(tl.int64) * (G * slots)
            at_part = start * D + (rows[:, None] * D + d[None, :])
            tl.store(partial + at_part, acc, mask=filled[:, None] & (d[None, :] < D))
            tl.store(lse + start + rows, tl.where(total == 0, float("-inf"), peak + tl.log2(total)), mask=filled)

    @triton.jit(do_not_specialize=["slots"])
    def _merge(
        partial,
        lse,
        out,
        lengths,
        starts,
        requests,
        slots,
        R: tl.constexpr,
        SPLITS: tl.constexpr,
        GRAIN: tl.constexpr,
        G: tl.constexpr,
        HKV: tl.constexpr,
        D: tl.constexpr,
        DP: tl.constexpr,
    ):
        """A few rows: the parts weighted by what each part's keys weigh."""
        pair = tl.program_id(1)
        request, h = tl.load(requests + pair // HKV), pair % HKV
        first = tl.load(starts + request)
        count = tl.load(starts + request + 1) - first
        rows = tl.program_id(0) * R + tl.arange(0, R)
        slot, group = rows // G, rows % G
        real = rows < G * count
        d = tl.arange(0, DP)
        grains = tl.cdiv(tl.load(lengths + request), GRAIN)
        share = tl.cdiv(grains, SPLITS)
        used = tl.cdiv(grains, tl.maximum(share, 1))
        step = G * slots
        start = pair.to(tl.int64) * SPLITS * step
        lse += start + rows
        partial += start * D + (rows[:, None] * D + d[None, :])
        merged = _weigh(partial, lse, rows, d, G * count, used, step, R, SPLITS, D, DP)
        at = ((first + slot) * (HKV * G) + h * G + group)[:, None] * D + d[None, :]
        tl.store(out + at, merged.to(out.dtype.element_ty), mask=real[:, None] & (d[None, :] < D))
