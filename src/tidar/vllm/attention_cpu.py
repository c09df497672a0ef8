"""Attention on a CPU: vLLM's own kernel, and PyTorch's masked one for the requests of a step that draft.

vLLM's kernel may keep keys in an order of its own, so a server that drafts keeps them plainly and uses PyTorch for all
requests. It is meant for tests and small models, not for speed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from tidar.kernels.paged import paged_attention_eager
from tidar.vllm.step import Visibility


class StepAttentionImpl(CPUAttentionBackendImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        self.drafting = "tidar" in (config.additional_config or {})

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if not self.drafting:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        keys, values = _split(kv_cache)
        real = slot_mapping >= 0
        block, place = slot_mapping[real] // keys.shape[2], slot_mapping[real] % keys.shape[2]
        keys[block, :, place] = key[: len(slot_mapping)][real]
        values[block, :, place] = value[: len(slot_mapping)][real]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if not self.drafting or attn_metadata is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        keys, values = _split(kv_cache)
        visibility: Visibility = attn_metadata.tidar
        paged_attention_eager(
            query,
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            torch.arange(len(attn_metadata.seq_lens)),
            visibility.enter,
            visibility.exit,
            self.scale,
            output,
        )
        return output


def _split(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, each [blocks, heads, block size, dim]."""
    blocks, heads, size, _ = kv_cache.shape
    keys, values = kv_cache.view(blocks, heads, size * 2, -1).chunk(2, dim=2)
    return keys, values


class StepAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[StepAttentionImpl]:
        return StepAttentionImpl
