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


def swiglu(
    partial: Tensor, width: int, low_rank: LowRank | None, slots: int, clean: int, dtype: torch.dtype
) -> Tensor:
    """[T, width] from partial sums [split, T, 2 * width + R]: gate columns, up columns, A(x) of both.

    low_rank.b is [R, 2 * width], block-diagonal where gate and up have a LoRA each.
    """
    split, tokens, stride = partial.shape
    out = partial.new_empty(tokens, width, dtype=dtype)
    block = 256 if tokens > 4 else 128
    _swiglu[(triton.cdiv(width, block), tokens)](
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
        RANK=low_rank.b.shape[0] // 2 if low_rank is not None and clean < slots else 0,
        BLOCK=block,
        num_warps=2 if block == 256 else 1,
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
        BLOCK: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """RANK is that of one of the two halves: gate's A(x) comes first, then up's."""
        token = tl.program_id(1).to(tl.int64)
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        y = partial + token * stride
        gate = tl.zeros((BLOCK,), tl.float32)
        up = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(SPLIT):
            at = y + part * tokens * stride + column
            gate += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            up += tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
        if RANK:
            if token % slots >= clean:
                for r in tl.static_range(RANK):
                    a_gate = 0.0
                    a_up = 0.0
                    for part in tl.static_range(SPLIT):
                        at_a = y + part * tokens * stride + start + r
                        a_gate += tl.load(at_a).to(tl.float32)
                        a_up += tl.load(at_a + RANK).to(tl.float32)
                    b = lora_b + r * 2 * width + column
                    gate += a_gate * tl.load(b, mask=inside, other=0.0).to(tl.float32)
                    b = lora_b + (RANK + r) * 2 * width + width + column
                    up += a_up * tl.load(b, mask=inside, other=0.0).to(tl.float32)
        kind = out.dtype.element_ty
        gate = gate.to(kind).to(tl.float32)
        activated = (gate * tl.sigmoid(gate)).to(kind)
        tl.store(out + token * width + column, (activated * up.to(kind)).to(kind), mask=inside)
