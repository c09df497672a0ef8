"""Attention of one decode step: every slot sees its row's whole prefix, and the step's own slots by the layout's rule.

The keys of a row are its `lengths[b]` cached tokens followed by the step's N slots. Nearly all of that is the prefix,
which is visible to everyone, so it needs no mask; only key tiles that reach into the step's own slots evaluate

    enter[k] <= enter[q] < exit[k]

from two integers a token (see layout.py). The query heads of a group times the N slots are the rows of one matrix, so
keys are read once a group, and the keys are split among programs whose partial results a second kernel merges by their
log-sum-exp (flash-decoding). Such a kernel lives for a few microseconds, so what it does once (indices, the first
loads, the epilogue) weighs as much as its loop.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar.kernels.launch import multiplies_from_shared, options, prefetch, processors, stages_for, tl, triton
from tidar.layout import Layout

MOST_SPLITS = 32


class Plan(NamedTuple):
    """How a step's attention is cut.

    Attributes:
        tile: rows a program.
        keys: keys a tile.
        grain: a part's keys are a multiple of this.
        stages: key tiles in flight.
        splits: parts of the keys.
        early: whether a program holds its first key tile in registers before it waits for the kernel before it.
    """

    tile: int
    keys: int
    grain: int
    stages: int
    splits: int
    early: bool


def plan_for(rows: int, pairs: int, capacity: int, query: Tensor) -> Plan:
    """The cut for `rows` rows a KV head of `query` [..., D], and `pairs` (row of the batch, KV head).

    It knows the cache's capacity and not the prefix, so that a captured graph fits every prefix length; the numbers
    were measured on an H100 with the cache half full.
    """
    return _fitted(_best_plan(rows, pairs, capacity, query.element_size(), processors(query.device)), query)


def _best_plan(rows: int, pairs: int, capacity: int, width: int, sms: int) -> Plan:
    """The cut for elements of `width` bytes and `sms` multiprocessors, were there room for everything."""
    tile = min(64, max(16, 1 << (rows - 1).bit_length()))
    programs = pairs * -(-rows // tile)
    keys = 64 if width < 4 else 32
    if tile < 64:
        # Nothing but latency: small parts, each a single tile until the cache is two thirds full.
        splits = min(2 * sms // programs, -(-capacity // 96), MOST_SPLITS)
        return Plan(tile, keys, 16, 2, max(splits, 1), True)
    # A program a multiprocessor, to merge little; two where each would otherwise have many tiles to work through.
    splits = max(sms // programs, 1)
    if capacity > 700 * splits:
        splits = 2 * sms // programs
    splits = max(1, min(splits, -(-capacity // keys), MOST_SPLITS))
    early = capacity <= 256 * splits
    return Plan(tile, keys, keys, 2 if early or width == 4 else 3, splits, early)


def _fitted(plan: Plan, query: Tensor) -> Plan:
    """The same with fewer tiles in flight, or smaller ones, where a GPU's shared memory cannot hold them."""
    width, dim = query.element_size(), triton.next_power_of_2(query.shape[-1])
    while True:
        weights = 0 if multiplies_from_shared(query.device) else plan.keys  # of the keys, on their way to registers
        rest = plan.tile * (dim + weights) * width
        stages = stages_for(query.device, plan.stages, 2 * plan.keys * dim * width, rest)
        if stages >= 2 or plan.tile == 16:
            return plan._replace(stages=max(1, stages))
        plan = plan._replace(keys=plan.keys // 2) if plan.keys > 32 else plan._replace(tile=plan.tile // 2)


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
        scale: factor of the scores, positive, usually 1 / sqrt(D).

    Returns:
        [B, N, H, D] in query's dtype.
    """
    batch, slots, heads, dim = query.shape
    kv_heads, capacity = keys.shape[1:3]
    groups, pairs = heads // kv_heads, batch * kv_heads
    rows = groups * slots
    plan = plan_for(rows, pairs, capacity, query)
    splits, merged_rows = plan.splits, 4 if plan.tile == 64 else 1
    out = torch.empty_like(query)
    partial, lse = out, out
    if splits > 1:
        partial = query.new_empty(pairs, splits, rows, dim, dtype=torch.float32)
        lse = query.new_empty(pairs, splits, rows, dtype=torch.float32)
    shape = {"G": groups, "HKV": kv_heads, "D": dim, "DP": triton.next_power_of_2(dim), "GRAIN": plan.grain}
    _split[(triton.cdiv(rows, plan.tile), pairs, splits)](
        query,
        keys,
        values,
        layout.prefix,
        layout.enter,
        layout.exit,
        partial,
        lse,
        slots,
        splits,
        scale * math.log2(math.e),
        layout.enter.stride(0),
        keys.stride(0),
        keys.stride(1),
        WHOLE=splits == 1,
        EARLY=plan.early,
        R=plan.tile,
        S=plan.keys,
        STAGES=plan.stages,
        num_warps=4,
        **shape,
        **options(query.device),
    )
    if splits > 1:
        _merge[(triton.cdiv(rows, merged_rows), pairs)](
            partial,
            lse,
            out,
            layout.prefix,
            slots,
            R=merged_rows,
            SPLITS=splits,
            num_warps=4,
            **shape,
            **options(query.device),
        )
    return out


if triton is not None:

    @triton.jit
    def _bounds(enter, exit, s, length, end):
        """The nodes that see the keys at `s`, as an interval: all of them for a cached key, none from `end` on."""
        own = s - length
        known = (own >= 0) & (s < end)
        opens = tl.load(enter + own, mask=known, other=0).to(tl.int32)
        closes = tl.load(exit + own, mask=known, other=0).to(tl.int32)
        return opens, tl.where(s < tl.minimum(length, end), 0x7FFFFFFF, closes)

    @triton.jit
    def _visible(score, opens, closes, node):
        """Scores of the keys that a row sees, minus infinity elsewhere."""
        return tl.where((opens[None, :] <= node[:, None]) & (node[:, None] < closes[None, :]), score, float("-inf"))

    @triton.jit
    def _fold(score, value, peak, total, acc, scale):
        """Add a tile of keys to the running softmax: its maximum, its sum, its weighted values."""
        top = tl.maximum(peak, tl.max(score, 1) * scale)
        base = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(score * scale - base[:, None])
        keep = tl.exp2(peak - base)
        acc = tl.dot(weight.to(value.dtype), value, acc * keep[:, None], input_precision="ieee")
        return top, total * keep + tl.sum(weight, 1), acc

    @triton.jit(do_not_specialize=["slots", "splits", "stride_node"])
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
        splits,
        scale,
        stride_node,
        stride_row,
        stride_head,
        WHOLE: tl.constexpr,
        EARLY: tl.constexpr,
        R: tl.constexpr,
        S: tl.constexpr,
        STAGES: tl.constexpr,
        G: tl.constexpr,
        HKV: tl.constexpr,
        D: tl.constexpr,
        DP: tl.constexpr,
        GRAIN: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """One tile of rows (row = slot * group size + head in the group) over one part of a row's keys."""
        pair, part = tl.program_id(1), tl.program_id(2)
        b, h = pair // HKV, pair % HKV
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        # Divided by a constant: dividing by `slots` would cost more instructions than a tile of keys.
        rows = tl.program_id(0) * R + tl.arange(0, R)
        slot, group = rows // G, rows % G
        real = rows < G * slots
        s, d = tl.arange(0, S), tl.arange(0, DP)
        place = s[:, None] * D + d[None, :]
        length = tl.load(prefix + b).to(tl.int32)
        share = tl.cdiv(tl.cdiv(length + slots, GRAIN), splits) * GRAIN
        begin = tl.minimum(part * share, length + slots)
        end = tl.minimum(begin + share, length + slots)
        old = tl.minimum(length, end)
        base = b.to(tl.int64) * stride_row + h.to(tl.int64) * stride_head
        keys += base
        values += base
        enter += b * stride_node
        exit += b * stride_node
        node = tl.load(enter + slot, mask=real, other=0).to(tl.int32)
        # The prefix was there before this step: it needs no waiting.
        if EARLY:
            cached = (begin + s < old)[:, None] & (d[None, :] < D)
            key = tl.load(keys + begin * D + place, mask=cached, other=0.0)
            value = tl.load(values + begin * D + place, mask=cached, other=0.0)
            opens, closes = _bounds(enter, exit, begin + s, length, end)
        elif PDL:
            lines: tl.constexpr = (DP + 63) // 64
            line = tl.arange(0, lines) * 64
            for at in range(begin, tl.minimum(old, begin + 2 * S), S):
                near = at * D + s[:, None] * D + line[None, :]
                cached = (at + s < old)[:, None] & (line < D)[None, :]
                prefetch(keys + near, cached, keys)
                prefetch(values + near, cached, values)
        at_q = ((b * slots + slot) * (HKV * G) + h * G + group)[:, None] * D + d[None, :]
        fits = real[:, None] & (d[None, :] < D)
        if PDL:
            tl.extra.cuda.gdc_wait()
        tile = tl.load(q + at_q, mask=fits, other=0.0)
        peak = tl.full((R,), float("-inf"), tl.float32)
        total = tl.zeros((R,), tl.float32)
        acc = tl.zeros((R, DP), tl.float32)
        if EARLY:
            fresh = ((begin + s >= length) & (begin + s < end))[:, None] & (d[None, :] < D)
            key = tl.load(keys + begin * D + place, mask=fresh, other=key)
            value = tl.load(values + begin * D + place, mask=fresh, other=value)
            score = tl.dot(tile, tl.trans(key), input_precision="ieee")
            peak, total, acc = _fold(_visible(score, opens, closes, node), value, peak, total, acc, scale)
            begin += S
        if begin < end:
            for at in tl.range(begin, end, S, num_stages=STAGES):
                inside = (at + s < end)[:, None] & (d[None, :] < D)
                key = tl.load(keys + at * D + place, mask=inside, other=0.0)
                value = tl.load(values + at * D + place, mask=inside, other=0.0)
                score = tl.dot(tile, tl.trans(key), input_precision="ieee")
                # Inside the one loop, so that these tiles are loaded ahead like all others.
                if at + S > old:
                    opens, closes = _bounds(enter, exit, at + s, length, end)
                    score = _visible(score, opens, closes, node)
                peak, total, acc = _fold(score, value, peak, total, acc, scale)
        acc = acc * (1.0 / tl.where(total == 0, 1.0, total))[:, None]
        if WHOLE:
            tl.store(partial + at_q, acc.to(partial.dtype.element_ty), mask=fits)
        else:
            # A part without keys writes nothing: the merge knows how many parts there are.
            filled = rows < tl.where(part * share < length + slots, G * slots, 0)
            first = (pair * splits + part).to(tl.int64) * (G * slots)
            at_part = first * D + (rows[:, None] * D + d[None, :])
            tl.store(partial + at_part, acc.to(partial.dtype.element_ty), mask=filled[:, None] & (d[None, :] < D))
            tl.store(lse + first + rows, tl.where(total == 0, float("-inf"), peak + tl.log2(total)), mask=filled)

    @triton.jit
    def _weigh(
        partial,
        lse,
        rows,
        d,
        count,
        used,
        step,
        R: tl.constexpr,
        SPLITS: tl.constexpr,
        D: tl.constexpr,
        DP: tl.constexpr,
    ):
        """[R, DP] the first `used` parts, `step` rows apart, of rows below `count`: by what their keys weigh."""
        # Unrolled, and the weights read twice: all loads are then in flight together.
        top = tl.full((R,), float("-inf"), tl.float32)
        for part in tl.static_range(SPLITS):
            filled = rows < tl.where(used > part, count, 0)
            top = tl.maximum(top, tl.load(lse + part * step, mask=filled, other=float("-inf")))
        top = tl.where(rows < count, top, 0.0)
        total = tl.zeros((R,), tl.float32)
        acc = tl.zeros((R, DP), tl.float32)
        for part in tl.static_range(SPLITS):
            filled = rows < tl.where(used > part, count, 0)
            weight = tl.exp2(tl.load(lse + part * step, mask=filled, other=float("-inf")) - top)
            values = tl.load(partial + part * step * D, mask=filled[:, None] & (d[None, :] < D), other=0.0)
            total += weight
            acc += weight[:, None] * values.to(tl.float32)
        return acc * (1.0 / tl.where(rows < count, total, 1.0))[:, None]

    @triton.jit(do_not_specialize=["slots"])
    def _merge(
        partial,
        lse,
        out,
        prefix,
        slots,
        R: tl.constexpr,
        SPLITS: tl.constexpr,
        G: tl.constexpr,
        HKV: tl.constexpr,
        D: tl.constexpr,
        DP: tl.constexpr,
        GRAIN: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """A few rows: the parts weighted by what each part's keys weigh."""
        pair = tl.program_id(1)
        b, h = pair // HKV, pair % HKV
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        rows = tl.program_id(0) * R + tl.arange(0, R)
        slot, group = rows // G, rows % G
        real = rows < G * slots
        d = tl.arange(0, DP)
        grains = tl.cdiv(tl.load(prefix + b).to(tl.int32) + slots, GRAIN)
        used = tl.cdiv(grains, tl.cdiv(grains, SPLITS))
        step = G * slots
        first = pair.to(tl.int64) * SPLITS * step
        lse += first + rows
        partial += first * D + (rows[:, None] * D + d[None, :])
        if PDL:
            tl.extra.cuda.gdc_wait()
        merged = _weigh(partial, lse, rows, d, step, used, step, R, SPLITS, D, DP)
        at = ((b * slots + slot) * (HKV * G) + h * G + group)[:, None] * D + d[None, :]
        tl.store(out + at, merged.to(out.dtype.element_ty), mask=real[:, None] & (d[None, :] < D))
