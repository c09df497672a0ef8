"""The gated LoRA on vLLM's linear layers, and the mask embedding: both act where a step's gate is open.

A step's tokens lie one after another, request by request, so the gate is a column of zeros and ones, one a token, that
stays where it is (CUDA graphs read it). Layers keep their own class's way of sharding and quantising weights: a gated
layer is the same object, of a subclass, with two more tensors.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from tidar.errors import TidarError
from tidar.kernels.gated import add_gated, add_gated_eager
from tidar.kernels.launch import available

logger = logging.getLogger(__name__)
TOLERANCE = 1e-2
"""Relative error of the kernel that rounding in 16 bits explains."""


class GatedLinear:
    """Mixin: y += gate * (x A^T) B^T, with the LoRA's scaling in B."""

    gate: Tensor
    lora_a: Tensor
    lora_b: Tensor

    def forward(self, x: Tensor) -> Any:
        result = super().forward(x)  # type: ignore[misc]
        y = result[0] if isinstance(result, tuple) else result
        low = F.linear(x, self.lora_a)
        if _adds_up(self):
            low = tensor_model_parallel_all_reduce(low)
        y = y + F.linear(low * self.gate[: x.shape[-2]], self.lora_b)
        return (y, *result[1:]) if isinstance(result, tuple) else y


class StackedLinear:
    """Mixin: the same where A lies under the layer's own weight, so that A x is a part of its product."""

    gate: Tensor
    lora_b: Tensor

    def forward(self, x: Tensor) -> Any:
        result = super().forward(x)  # type: ignore[misc]
        product = result[0] if isinstance(result, tuple) else result
        y = torch.ops.tidar.add_gated(product, self.lora_b, self.gate)
        return (y, *result[1:]) if isinstance(result, tuple) else y


class GatedEmbedding:
    """Mixin: the mask embedding in place of the token's where the gate is open."""

    gate: Tensor
    mask_embedding: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.lookup(ids)
        return torch.where(self.gate[: ids.shape[-1]] > 0, self.mask_embedding, tokens)

    def lookup(self, ids: Tensor) -> Tensor:
        """Embeddings of tokens, whatever the gate says."""
        return super().forward(ids)  # type: ignore[misc]


def gate_embedding(layer: VocabParallelEmbedding, mask_embedding: Tensor, gate: Tensor) -> None:
    _become(layer, GatedEmbedding)
    like = layer.weight
    _hold(layer, gate=gate, mask_embedding=mask_embedding.to(like.device, gate.dtype))


def gate_linear(layer: LinearBase, parts: Sequence[tuple[Any, Tensor, Tensor]], gate: Tensor) -> None:
    """Add a LoRA to a layer, which may be several layers of the checkpoint stacked.

    Args:
        layer: one of vLLM's linear layers.
        parts: (shard, A [rank, in], B [out, rank] with scaling) of each of them; shard is vLLM's name of the part.
        gate: [most tokens, 1].
    """
    stacks = can_stack(layer, gate.device)
    cut = stacks or _in_shares(layer)  # else every rank has the layer's whole input
    a = torch.cat([_share_of_a(layer, a) if cut else a for _, a, _ in parts]).to(gate)
    # Each part's B fills its own rows only, so side by side they are block-diagonal.
    b = torch.cat([_share_of_b(layer, b, shard) for shard, _, b in parts], 1).to(gate)
    if stacks:
        _become(layer, StackedLinear)
        _stack(layer, a)
        _hold(layer, gate=gate, lora_b=b)
    else:
        _become(layer, GatedLinear)
        _hold(layer, gate=gate, lora_a=a, lora_b=b)


def _in_shares(layer: Any) -> bool:
    """Whether a layer is given a share of its input on each of several ranks."""
    return isinstance(layer, RowParallelLinear) and layer.tp_size > 1 and layer.input_is_parallel


def _adds_up(layer: Any) -> bool:
    """Whether such a layer adds up what its ranks have; else whoever does adds up their parts of the LoRA as well."""
    return _in_shares(layer) and layer.reduce_results


def can_stack(layer: LinearBase, device: torch.device) -> bool:
    """Whether rows can be put under a layer's weight: it is a plain matrix, and our kernel runs here."""
    plain = isinstance(layer.quant_method, UnquantizedLinearMethod) and layer.weight.ndim == 2
    alone = getattr(layer, "tp_size", 1) == 1
    whole = alone or (getattr(layer, "reduce_results", True) and not getattr(layer, "gather_output", False))
    return plain and whole and not layer.skip_bias_add and kernel_works(device, layer.weight.dtype)


@functools.cache
def kernel_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `add_gated` runs on the devices of all ranks: layers of one kind wait for each other, not for another's.

    All ranks must ask in the same order.
    """
    return on_all_ranks(available(device) and kernel_works_here(device, dtype))


def on_all_ranks(verdict: bool) -> bool:
    """Whether all ranks of the model say so."""
    group = get_tp_group()
    if group.world_size == 1:
        return verdict
    votes = torch.tensor(int(verdict))
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN, group.cpu_group)
    if verdict and not votes:
        logger.warning("tidar: decoding does without some kernels, as they do not run on another GPU")
    return bool(votes)


def kernel_works_here(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `add_gated` runs on a device and gives what its eager twin gives; logged if not."""
    product, b = torch.randn(40, 300 + 32, device=device, dtype=dtype), torch.randn(300, 32, device=device, dtype=dtype)
    gate = (torch.arange(40, device=device) >= 8).to(dtype)[:, None]
    try:
        given, wanted = add_gated(product, b, gate), add_gated_eager(product.double(), b.double(), gate.double())
        error = float((given.double() - wanted).norm() / wanted.norm())
    except Exception as failure:  # whatever a compiler may raise: there is another way
        logger.warning("tidar: the gated LoRA runs without its kernel, which is slower: %s", failure)
        return False
    if error > TOLERANCE:
        logger.warning("tidar: the gated LoRA runs without its kernel, which is off by %.1e", error)
    return error <= TOLERANCE


def _stack(layer: LinearBase, a: Tensor) -> None:
    """Put A under the weight of a layer; whoever shares the weight goes on with the rows that it had."""
    old, bias = layer.weight, getattr(layer, "bias", None)
    whole = torch.cat((old.data, a))
    old.data = whole[: len(old)]
    layer.weight = nn.Parameter(whole, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(torch.cat((bias.data, bias.new_zeros(len(a)))), requires_grad=False)


def _add_gated(product: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """Over the last two dimensions of product [..., O + R]; `gate` has room for more tokens."""
    rows = product.reshape(-1, product.shape[-1])
    add = add_gated if available(product.device) else add_gated_eager
    return add(rows, b, gate[: len(rows)]).view(*product.shape[:-1], len(b))


def _like_added(product: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    return product.new_empty(*product.shape[:-1], b.shape[0])


# To the compiler a single operation: it would not know what to make of the kernel.
LIBRARY = torch.library.Library("tidar", "FRAGMENT")
LIBRARY.define("add_gated(Tensor product, Tensor b, Tensor gate) -> Tensor")
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("add_gated", _add_gated, _key)
torch.library.register_fake("tidar::add_gated", _like_added, lib=LIBRARY)


def _share_of_a(layer: LinearBase, a: Tensor) -> Tensor:
    """This rank's share of A [rank, in], cut as the layer cuts its weight."""
    if not isinstance(layer, RowParallelLinear):
        return a
    share = nn.Parameter(a.new_zeros(len(a), layer.input_size_per_partition), requires_grad=False)
    share.input_dim = 1  # type: ignore[attr-defined]
    layer.weight_loader(share, a)
    return share.data


def _share_of_b(layer: LinearBase, b: Tensor, shard: Any) -> Tensor:
    """This rank's share of B [out, rank], or all of it where the layer's output is; rows of other parts are zero."""
    if not isinstance(layer, ColumnParallelLinear) or (layer.gather_output and shard is None):
        return b
    share = nn.Parameter(b.new_zeros(layer.output_size_per_partition, b.shape[1]), requires_grad=False)
    share.output_dim = 0  # type: ignore[attr-defined]
    layer.weight_loader(share, b, *(() if shard is None else (shard,)))
    return share.data


def _become(layer: nn.Module, mixin: type) -> None:
    if isinstance(layer, mixin):
        raise TidarError(f"{type(layer).__name__} has a drafter already")
    kind = type(layer)
    layer.__class__ = type(f"{mixin.__name__}Of{kind.__name__}", (mixin, kind), {})


def _hold(layer: nn.Module, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        layer.register_buffer(name, tensor, persistent=False)
