"""The gated LoRA on vLLM's linear layers, and the mask embedding: both act where a step's gate is open.

A step's tokens lie one after another, request by request, so the gate is a column of zeros and ones, one a token, that
stays where it is (CUDA graphs read it). Layers keep their own class's way of sharding and quantising weights: a gated
layer is the same object, of a subclass, with two more tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from tidar.errors import TidarError


class GatedLinear:
    """Mixin: y += gate * (x A^T) B^T, with the LoRA's scaling in B."""

    gate: Tensor
    lora_a: Tensor
    lora_b: Tensor

    def forward(self, x: Tensor) -> Any:
        result = super().forward(x)  # type: ignore[misc]
        y = result[0] if isinstance(result, tuple) else result
        low = F.linear(x, self.lora_a)
        if isinstance(self, RowParallelLinear) and self.tp_size > 1:
            low = tensor_model_parallel_all_reduce(low)
        y = y + F.linear(low * self.gate[: x.shape[-2]], self.lora_b)
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
    a = [_share_of_a(layer, a) for _, a, _ in parts]
    b = [_share_of_b(layer, b, shard) for shard, _, b in parts]
    _become(layer, GatedLinear)
    # Each part's B fills its own rows only, so side by side they are block-diagonal.
    _hold(layer, gate=gate, lora_a=torch.cat(a).to(gate), lora_b=torch.cat(b, 1).to(gate))


def _share_of_a(layer: LinearBase, a: Tensor) -> Tensor:
    """This rank's share of A [rank, in], cut as the layer cuts its weight."""
    if not isinstance(layer, RowParallelLinear):
        return a
    share = nn.Parameter(a.new_zeros(len(a), layer.input_size_per_partition), requires_grad=False)
    share.input_dim = 1  # type: ignore[attr-defined]
    layer.weight_loader(share, a)
    return share.data


def _share_of_b(layer: LinearBase, b: Tensor, shard: Any) -> Tensor:
    """This rank's share of B [out, rank]; the rows of other parts are zero."""
    if not isinstance(layer, ColumnParallelLinear):
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
