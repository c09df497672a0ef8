"""The gated activation of a feed-forward layer: silu(gate) * up, both from one projection (+ LoRA on masks)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar.kernels.launch import options, tl, triton
from tidar.kernels.norm import LowRank, masked_delta, summed


def swiglu_eager(partial: Tensor, width: int, low_rank: LowRank | None, slots: int, clean: int) -> Tensor:
    """See `swiglu`."""
    y = summed(partial)
    both = y[:, : 2 * width]
    if low_rank is not None:
        both = both + masked_delta(y, low_rank, slots, clean)
    kind = partial.dtype if partial.dtype != torch.float32 else torch.float32
    gate, up = both.to(kind).chunk(2, -1)
    return F.silu(gate) * up


def swiglu(partial: Tensor, width: int, low_rank: LowRank | None, slots: int, clean: int, dtype: torch.dtype) -> Tensor:
    """[T, width] from partial sums [split, T, 2 * width + R]: gate columns, up columns, A(x) of both.

    low_rank.b is [R, 2 * width], block-diagonal where gate and up have a LoRA each.
    """
    split, tokens, stride = partial.shape
    out = partial.new_empty(tokens, width, dtype=dtype)
    rank = low_rank.b.shape[0] // 2 if low_rank is not None and clean < slots else 0
    tile = 16 if rank else 4 if tokens > 16 else 1
    _swiglu[(triton.cdiv(width, 128), triton.cdiv(tokens, tile))](
        partial,
        low_rank.b if low_rank is not None else partial,
        out,
        width,
        stride,
        low_rank.start if low_rank is not None else 0,
        slots,
        clean,
        tokens,
        SPLIT=split,
        RANK=rank,
        RP=max(16, triton.next_power_of_2(rank)),
        TILE=tile,
        BLOCK=128,
        num_warps=4 if rank else 2 if tile > 1 else 1,
        **options(partial.device),
    )
    return out


if triton is not None:

    @triton.jit
    def _swiglu(
        partial,
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
        PDL: tl.constexpr,
    ):
        """A tile of tokens by columns. RANK is that of one half: gate's A(x) comes first, then up's."""
        token = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = (token < tokens)[:, None] & (column < width)[None, :]
        kind = out.dtype.element_ty
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        if RANK:
            r = tl.arange(0, RP)
            real = (r < RANK)[:, None] & (column < width)[None, :]
            b_gate = tl.load(lora_b + r[:, None] * 2 * width + column[None, :], mask=real, other=0.0)
            at_b = lora_b + (RANK + r)[:, None] * 2 * width + width + column[None, :]
            b_up = tl.load(at_b, mask=real, other=0.0)
        if PDL:
            tl.extra.cuda.gdc_wait()
        gate = tl.zeros((TILE, BLOCK), tl.float32)
        up = tl.zeros((TILE, BLOCK), tl.float32)
        row = partial + token[:, None] * stride
        for part in tl.static_range(SPLIT):
            at = row + part * tokens * stride + column[None, :]
            gate += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            up += tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
        if RANK:
            a_gate = tl.zeros((TILE, RP), tl.float32)
            a_up = tl.zeros((TILE, RP), tl.float32)
            masks = (token < tokens) & (token % slots >= clean)
            real_a = masks[:, None] & (r < RANK)[None, :]
            for part in tl.static_range(SPLIT):
                at_a = row + part * tokens * stride + start + r[None, :]
                a_gate += tl.load(at_a, mask=real_a, other=0.0).to(tl.float32)
                a_up += tl.load(at_a + RANK, mask=real_a, other=0.0).to(tl.float32)
            gate = tl.dot(a_gate.to(kind), b_gate, gate, input_precision="ieee")
            up = tl.dot(a_up.to(kind), b_up, up, input_precision="ieee")
        gate = gate.to(kind).to(tl.float32)
        activated = (gate * tl.sigmoid(gate)).to(kind)
        tl.store(out + token[:, None] * width + column[None, :], (activated * up.to(kind)).to(kind), mask=inside)
