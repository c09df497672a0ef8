"""The fused decoder layers for a CPU: weights laid out once as oneDNN reads them, few small operations between.

A stock linear layer in bfloat16 rearranges its weight at every call, which at 12 rows costs more than the product. Here
every fused weight (see fused.py) and the output embedding are also kept packed, which costs the weights' memory once
more; the stock modules keep theirs and go on working. Token rows are slot-major (slot 0 of every batch row, then slot
1, ...), so that the masks of a whole batch are its tail.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tidar.kernels.norm import LowRank
from tidar.layout import Layout
from tidar.model.fused import FusedBackbone, FusedLayer, Projection

PACKED_FOR = 16
"""Rows the packed form is chosen for; other counts run on it as well within a few percent."""


def fast_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16 (AMX or AVX512-BF16) and torch can pack weights for it."""
    return can_pack(torch.bfloat16) and torch.cpu._is_avx512_bf16_supported()


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this CPU have oneDNN products with packed weights of `dtype`."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PlainLinear:
    """y = W x + bias + B a, where `a` is the gated A x of a LoRA; then silu(y), y * other, or y itself."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, b: Tensor | None = None) -> None:
        """weight is [N, K], b [R, N]."""
        self.weight, self.bias, self.b = weight, bias, b

    def __call__(
        self, x: Tensor, a: Tensor | None = None, *, silu: bool = False, times: Tensor | None = None
    ) -> Tensor:
        """[..., N] of x [..., K] and a [..., R]; no `a` is zero."""
        y = F.linear(x, self.weight, self.bias)
        if a is not None and self.b is not None:
            y.addmm_(a, self.b)
        if silu:
            y = F.silu(y)
        return y if times is None else y.mul_(times)


class PackedLinear(PlainLinear):
    """The same as one oneDNN product: W and B stand side by side, and read x and a."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, b: Tensor | None = None) -> None:
        super().__init__(weight, bias, b)
        whole = weight if b is None else torch.cat((weight, b.T), 1)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(whole, PACKED_FOR)
        self.product = torch.ops.mkldnn._linear_pointwise.default
        self.product_times = torch.ops.mkldnn._linear_pointwise.binary
        # A single float32 row is a matrix-vector product, which reads the plain weight faster.
        self.fewest = 2 if weight.dtype == torch.float32 else 1

    def __call__(
        self, x: Tensor, a: Tensor | None = None, *, silu: bool = False, times: Tensor | None = None
    ) -> Tensor:
        if x.numel() < self.fewest * x.shape[-1]:
            return super().__call__(x, a, silu=silu, times=times)
        if self.b is not None:
            x = F.pad(x, (0, len(self.b))) if a is None else torch.cat((x, a), -1)
        if times is not None:
            return self.product_times(x, times, self.packed, self.bias, "mul")
        return self.product(x, self.packed, self.bias, "swish" if silu else "none", [], "")


class Norm:
    """RMS norm of float32 rows: h weight / sqrt(mean(h^2) + eps), as h (sqrt(n) weight) / hypot(|h|, sqrt(n eps))."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        n = weight.shape[-1]
        self.weight = weight.float() * n**0.5
        self.least = torch.full((1,), (n * eps) ** 0.5)

    def __call__(self, h: Tensor, dtype: torch.dtype) -> Tensor:
        size = torch.linalg.vector_norm(h, 2, -1, True).hypot_(self.least)
        return (h * self.weight).div_(size).to(dtype)


class PackedLayer:
    """One decoder layer."""

    def __init__(self, layer: FusedLayer, eps: float, linear: type[PlainLinear]) -> None:
        self.heads, self.scale = layer.heads, layer.scale
        self.input_norm, self.post_norm = Norm(layer.input_norm, eps), Norm(layer.post_norm, eps)
        q, k = self.heads.q_norm, self.heads.k_norm
        self.head_norm: Norm | None = None
        if q is not None and k is not None:
            self.head_norm = Norm(
                torch.cat((q.expand(self.heads.query, -1), k.expand(self.heads.kv, -1))), self.heads.eps
            )
        self.qkv_a, (self.qkv,) = _unstack(layer.qkv, 1, linear)
        self.out_a, (self.out,) = _unstack(layer.out, 1, linear)
        self.gate_up_a, (self.gate, self.up) = _unstack(layer.gate_up, 2, linear)
        self.down_a, (self.down,) = _unstack(layer.down, 1, linear)


def _unstack(
    projection: Projection, parts: int, linear: type[PlainLinear]
) -> tuple[PlainLinear | None, list[PlainLinear]]:
    """The LoRA's A of a projection, and the projection as `parts` linear layers of equal width."""
    stacked, bias, low_rank = projection.weight, projection.bias, projection.low_rank
    assert isinstance(stacked, Tensor), "no kernel here reads quantised numbers, so weights are rounded in place"
    weight = stacked[: projection.width]
    biases = [None] * parts if bias is None else bias.chunk(parts)
    if low_rank is None:
        return None, [linear(w, b) for w, b in zip(weight.chunk(parts), biases, strict=True)]
    a = linear(stacked[projection.width :])
    return a, [
        linear(w, bias, b) for w, bias, b in zip(weight.chunk(parts), biases, _blocks(low_rank, parts), strict=True)
    ]


def _blocks(low_rank: LowRank, parts: int) -> list[Tensor]:
    """The diagonal blocks of B."""
    return [rows.chunk(parts, 1)[i].contiguous() for i, rows in enumerate(low_rank.b.chunk(parts))]


class Gate:
    """Opens a LoRA for masks, the token rows from `clean` on."""

    def __init__(self, tokens: int, clean: int, dtype: torch.dtype) -> None:
        self.column = (torch.arange(tokens) >= clean).to(dtype)[:, None]
        self.open, self.wide = clean < tokens, dict[int, Tensor]()

    def __call__(self, a: PlainLinear | None, x: Tensor) -> Tensor | None:
        """A x on masks and zero elsewhere; None if that is all."""
        if a is None or not self.open:
            return None
        rank = len(a.weight)
        if rank not in self.wide:
            self.wide[rank] = self.column.expand(-1, rank).contiguous()
        return a(x, times=self.wide[rank])


class Window:
    """Where one forward's keys and values go in a row cache, and what its queries see."""

    def __init__(self, layout: Layout, cache: Any, dtype: torch.dtype) -> None:
        batch, self.slots = len(layout.prefix), layout.size
        self.start = int(layout.prefix[0]) if batch == 1 else None
        self.mask: Tensor | None = None
        self.width: int = cache.width
        if self.start is not None and self.slots == 1:
            self.width = self.start + 1  # the one token sees everything
        else:
            visible = layout.dense_mask(self.width)
            self.mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
        self.rows = torch.arange(batch)
        self.at = torch.arange(self.slots)[:, None] + layout.prefix

    def store(self, held: Tensor, new: Tensor) -> Tensor:
        """Write new [N, B, H_kv, D] behind the prefixes in held [B, H_kv, capacity, D]; returns what queries see."""
        if self.start is None:
            held[self.rows, :, self.at] = new
        else:
            held[0].narrow(1, self.start, self.slots).copy_(new[:, 0].transpose(0, 1))
        return held.narrow(2, 0, self.width)


class PackedBackbone:
    """Runs embedded tokens through all layers. Between the products the residual stream is float32.

    Attributes:
        head: the output embedding, logits [..., V] of hidden states [..., H].
        most_slots: larger forwards are not for it; there are none.
    """

    most_slots = 1 << 62

    def __init__(self, fused: FusedBackbone, head: nn.Linear) -> None:
        held = [p.weight for layer in fused.layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        packs = can_pack(head.weight.dtype) and _fits(sum(w.nbytes for w in (*held, head.weight)))
        linear = PackedLinear if packs else PlainLinear
        with torch.inference_mode(False), torch.no_grad():
            self.layers = [PackedLayer(layer, fused.eps, linear) for layer in fused.layers]
            self.final_norm, self.rotary_emb = Norm(fused.final_norm, fused.eps), fused.rotary_emb
            self.head = linear(head.weight, head.bias)

    def __call__(self, embedded: Tensor, layout: Layout, position: Tensor, cache: Any) -> Tensor:
        """Final hidden states [B, N, H] of embedded [B, N, H]; keys and values go behind each row of `cache`."""
        batch, slots, width = embedded.shape
        dtype = embedded.dtype
        gate, window = Gate(batch * slots, batch * layout.clean, dtype), Window(layout, cache, dtype)
        turn = self._turn(embedded, position)
        h = embedded.transpose(0, 1).reshape(-1, width).to(torch.float32, copy=True)
        for index, layer in enumerate(self.layers):
            keys, values = cache.layer(index, layer.heads.kv, layer.heads.dim, dtype)
            x = layer.input_norm(h, dtype)
            context = _attend(layer, layer.qkv(x, gate(layer.qkv_a, x)), turn, window, keys, values)
            h.add_(layer.out(context, gate(layer.out_a, context)))
            h.add_(_feed_forward(layer, layer.post_norm(h, dtype), gate))
        return self.final_norm(h, dtype).view(slots, batch, width).transpose(0, 1)

    def _turn(self, embedded: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, 2, D / 2] of the rotary embedding; a half turns by cos * itself + sin * the other half."""
        turn = self.rotary_emb(embedded, position.T.reshape(1, -1))
        cos, sin = (x[0].to(embedded.dtype).unflatten(1, (2, -1))[:, None] for x in turn)
        return cos, torch.cat((-sin[:, :, :1], sin[:, :, 1:]), 2)


def _attend(
    layer: PackedLayer, qkv: Tensor, turn: tuple[Tensor, Tensor], window: Window, keys: Tensor, values: Tensor
) -> Tensor:
    """[T, H * D] what attention reads for the projected rows qkv [T, (H + 2 H_kv) D]."""
    heads, (cos, sin) = layer.heads, turn
    split = qkv.view(window.slots, -1, heads.query + 2 * heads.kv, heads.dim)
    qk, v = split.split((heads.query + heads.kv, heads.kv), 2)
    if layer.head_norm is not None:
        qk = layer.head_norm(qk.float(), qkv.dtype)
    halves = qk.view(len(qkv), -1, 2, heads.dim // 2)
    q, k = (halves * cos).addcmul_(halves.flip(2), sin).view(qk.shape).split((heads.query, heads.kv), 2)
    context = F.scaled_dot_product_attention(
        q.permute(1, 2, 0, 3),
        window.store(keys, k),
        window.store(values, v),
        attn_mask=window.mask,
        scale=layer.scale,
        enable_gqa=heads.query != heads.kv,
    )
    return context.permute(2, 0, 1, 3).reshape(len(qkv), -1)


def _feed_forward(layer: PackedLayer, x: Tensor, gate: Gate) -> Tensor:
    a = gate(layer.gate_up_a, x)
    for_gate, for_up = (None, None) if a is None else a.chunk(2, -1)
    x = layer.up(x, for_up, times=layer.gate(x, for_gate, silu=True))
    return layer.down(x, gate(layer.down_a, x))


def _fits(size: int) -> bool:
    """Whether a packed copy of `size` bytes leaves as much memory free as it takes (where the system says)."""
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return True
    return 2 * size <= free
