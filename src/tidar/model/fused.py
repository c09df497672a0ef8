"""The decoder layers of a Llama-like model as few large kernels, for forwards over a row cache.

`fuse` reads a stock transformers model: q, k, v and gate, up become one weight each, with the drafter's LoRA A stacked
underneath, so that a gated LoRA costs no launch of its own: the base projection computes A(x) along the way, and the
kernel that reads it adds B(A(x)) to the masks. The stock modules keep working: their weights become views of the fused
ones. A model that is built differently, or behaves differently when tried, is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tidar.kernels import attention, norm, rotary, swiglu
from tidar.kernels.draft import Walk
from tidar.kernels.launch import available
from tidar.kernels.linear import linear, linear_eager
from tidar.kernels.norm import LowRank
from tidar.kernels.rotary import Heads
from tidar.kernels.weights import QuantWeight, quantise, stack
from tidar.layout import Layout
from tidar.model.gated_lora import GatedLinear
from tidar.model.quantised import move_weight, stored_weight

MOST_TURNS = 1 << 18
"""Positions in a table of rotary angles; 134 MB in 16 bits at head dimension 128."""
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass
class Projection:
    """Linear layers that read the same input, as one: weight [N + R, K], A(x) in the last R columns."""

    weight: Tensor | QuantWeight
    width: int
    bias: Tensor | None
    low_rank: LowRank | None

    def seen_by(self, masks: bool) -> Tensor | QuantWeight:
        """The weight that a forward needs: A only where there are masks."""
        return self.weight if masks else self.weight[: self.width]


@dataclass
class FusedLayer:
    """One decoder layer."""

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    heads: Heads
    scale: float
    input_norm: Tensor
    post_norm: Tensor


class FusedBackbone:
    """Runs embedded tokens through all layers, by Triton kernels or (`kernels` False) by their eager twins."""

    most_slots = 1024
    """Longer prompts go through the stock modules, whose attention knows which keys it can skip."""

    def __init__(self, layers: list[FusedLayer], final_norm: Tensor, eps: float, rotary_emb: nn.Module) -> None:
        self.layers, self.final_norm, self.eps, self.rotary_emb = layers, final_norm, eps, rotary_emb
        self.kernels = available(final_norm.device)
        self.turns = turn_table(rotary_emb, final_norm)
        self.walk: Walk | None = None  # the sampler head, folded when it first drafts (see propose.py)

    def __call__(self, embedded: Tensor, layout: Layout, position: Tensor, cache: Any) -> Tensor:
        """Final hidden states [B, N, H] of embedded [B, N, H]; keys and values go behind each row of `cache`."""
        kernels = self.kernels
        project = linear if kernels else linear_eager
        add_norm = norm.add_norm if kernels else norm.add_norm_eager
        rotate = rotary.rotate if kernels else rotary.rotate_eager
        attend = attention.step_attention if kernels else attention.step_attention_eager
        batch, slots, width = embedded.shape
        clean, masks = layout.clean, layout.clean < slots
        if self.turns is None:
            cos, sin = self.rotary_emb(embedded, position)
        else:
            cos, sin = (table[position] for table in self.turns)
        h, partial, before = embedded.reshape(-1, width), None, None
        for index, layer in enumerate(self.layers):
            h, x = self._norm(add_norm, h, partial, layer.input_norm, before, slots, clean)
            keys, values = cache.layer(index, layer.heads.kv, layer.heads.dim, embedded.dtype)
            y = project(x, layer.qkv.seen_by(masks))
            query = rotate(
                y,
                layer.heads,
                layer.qkv.low_rank if masks else None,
                cos,
                sin,
                keys,
                values,
                layout.prefix,
                slots,
                clean,
            )
            context = attend(query, keys, values, layout, layer.scale)
            partial = project(context.reshape(batch * slots, -1), layer.out.seen_by(masks))
            h, x = self._norm(add_norm, h, partial, layer.post_norm, layer.out, slots, clean)
            y = project(x, layer.gate_up.seen_by(masks))
            inner, low_rank = layer.gate_up.width // 2, layer.gate_up.low_rank if masks else None
            if kernels:
                x = swiglu.swiglu(y, inner, low_rank, slots, clean, h.dtype)
            else:
                x = swiglu.swiglu_eager(y, inner, low_rank, slots, clean)
            partial, before = project(x, layer.down.seen_by(masks)), layer.down
        _, x = self._norm(add_norm, h, partial, self.final_norm, before, slots, clean)
        return x.view(batch, slots, width)

    def head(self, hidden: Tensor, output: nn.Linear) -> Tensor:
        """Logits [..., V] of hidden [..., H], float32: rounded to bfloat16, the likeliest tokens would often tie."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        weight = stored_weight(output)
        logits = linear(rows, weight, unrounded=True) if self.kernels else linear_eager(rows, weight)
        logits = logits.sum(0) if len(logits) > 1 else logits[0]
        if output.bias is not None:
            logits = logits + output.bias
        return logits.view(*hidden.shape[:-1], -1)

    def _norm(
        self,
        add_norm: Any,
        h: Tensor,
        partial: Tensor | None,
        weight: Tensor,
        of: Projection | None,
        slots: int,
        clean: int,
    ) -> tuple[Tensor, Tensor]:
        low_rank = of.low_rank if of is not None and clean < slots else None
        bias = of.bias if of is not None else None
        return add_norm(h, partial, weight, self.eps, low_rank, slots, clean, bias)


@torch.no_grad()
def turn_table(rotary_emb: Any, like: Tensor) -> Tensor | None:
    """[2, P, D] cosines and sines of all P positions of the context, which saves a step a dozen small kernels.

    None where they depend on more than the position, or there are too many.
    """
    positions = int(getattr(rotary_emb, "max_seq_len_cached", 0))
    if getattr(rotary_emb, "rope_type", "dynamic") in ("dynamic", "longrope") or not 0 < positions <= MOST_TURNS:
        return None
    every = torch.arange(positions, device=like.device)[None]
    return torch.cat(rotary_emb(like, every)).contiguous()


def fuse(backbone: Any) -> FusedBackbone | None:
    """The fused twin of `backbone`, or None if it is not built like a Llama. Stock weights become views, in place."""
    if not fusable(backbone):
        return None
    eps = backbone.norm.variance_epsilon
    return FusedBackbone(
        [_fuse_layer(layer) for layer in backbone.layers], backbone.norm.weight, eps, backbone.rotary_emb
    )


def fusable(backbone: Any) -> bool:
    """Whether `backbone` is built like a Llama."""
    names = {name for name, _ in backbone.named_children()}
    if names != {"embed_tokens", "layers", "norm", "rotary_emb"} or not all(map(_llama_like, backbone.layers)):
        return False
    turned = getattr(backbone.rotary_emb, "inv_freq", torch.empty(0))
    return all(2 * len(turned) == layer.self_attn.head_dim for layer in backbone.layers)


def _llama_like(layer: Any) -> bool:
    def names(module: nn.Module) -> set[str]:
        return {name for name, _ in module.named_children()}

    if names(layer) != LAYER:
        return False
    attn, mlp = layer.self_attn, layer.mlp
    if names(attn) - {"q_norm", "k_norm"} != ATTENTION or names(mlp) != MLP:
        return False
    linears = [getattr(attn, n) for n in ATTENTION] + [getattr(mlp, n) for n in MLP - {"act_fn"}]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    return (
        all(isinstance(m, nn.Linear) for m in linears)
        and all(hasattr(n, "variance_epsilon") for n in norms)
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and mlp.down_proj.bias is None
        and mlp.gate_proj.bias is None
        and getattr(attn, "use_rope", True)  # SmolLM3 leaves it away in some layers
    )


def _fuse_layer(layer: Any) -> FusedLayer:
    attn, mlp = layer.self_attn, layer.mlp
    dim = attn.head_dim
    qkv, out = _fuse([attn.q_proj, attn.k_proj, attn.v_proj]), _fuse([attn.o_proj])
    q_norm, k_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
    heads = Heads(
        query=attn.q_proj.out_features // dim,
        kv=attn.k_proj.out_features // dim,
        dim=dim,
        bias=qkv.bias,
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if k_norm is None else k_norm.weight,
        eps=layer.input_layernorm.variance_epsilon if q_norm is None else q_norm.variance_epsilon,
    )
    gate_up, down = _fuse([mlp.gate_proj, mlp.up_proj]), _fuse([mlp.down_proj])
    norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    return FusedLayer(qkv, out, gate_up, down, heads, attn.scaling, *norms)


@torch.inference_mode(False)
@torch.no_grad()
def _fuse(linears: list[nn.Linear]) -> Projection:
    """Stack the layers' weights, then their LoRA A; B becomes one block-diagonal matrix."""
    like = linears[0].weight
    adapted = [x for x in linears if isinstance(x, GatedLinear)]
    rank = max((x.lora_A.out_features for x in adapted), default=0)
    width = sum(x.out_features for x in linears)
    a = like.new_zeros(rank * len(linears), like.shape[1])
    b = like.new_zeros(rank * len(linears), width)
    start = 0
    for index, x in enumerate(linears):
        end = start + x.out_features
        if isinstance(x, GatedLinear):
            at = slice(rank * index, rank * (index + 1))
            a[at] = x.lora_A.weight
            b[at, start:end] = x.lora_B.weight.T * x.scaling
        start = end
    biases: list[Tensor] = [x.bias if x.bias is not None else like.new_zeros(x.out_features) for x in linears]
    bias = None if all(x.bias is None for x in linears) else torch.cat(biases)
    return Projection(_stacked(linears, a), width, bias, LowRank(b, width) if rank else None)


def _stacked(linears: list[nn.Linear], a: Tensor) -> Tensor | QuantWeight:
    """The layers' weights over a [R, K], which is quantised if they are; theirs become views of the result."""
    weights = [stored_weight(x) for x in linears]
    whole: Tensor | QuantWeight
    if isinstance(weights[0], QuantWeight):
        whole = stack([*weights, quantise(a, weights[0].kind)])  # type: ignore[list-item]
    else:
        whole = torch.cat([*weights, a])  # type: ignore[list-item]
    start = 0
    for x in linears:
        move_weight(x, whole[start : start + x.out_features])
        start += x.out_features
    return whole
