"""Attention on a GPU: FlashAttention, as vLLM has it, and our kernel for the requests of a step that draft."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from tidar.errors import TidarError
from tidar.kernels.paged import paged_attention
from tidar.vllm.step import Visibility


class StepMetadataBuilder(FlashAttentionMetadataBuilder):
    """Full CUDA graphs are for steps of one shape: of plain decoding or of drafting, never of both."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH


class StepAttentionImpl(FlashAttentionImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        special = {
            "sliding windows": self.sliding_window != (-1, -1),
            "ALiBi": self.alibi_slopes is not None,
            "capped scores": bool(self.logits_soft_cap),
            "attention sinks": self.sinks is not None,
        }
        for name, has in special.items():
            if has:
                raise TidarError(f"this model has {name}, which drafting does not know: serve it with --mode ar")

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
        visibility: Visibility | None = None if attn_metadata is None else attn_metadata.tidar
        if visibility is None or not visibility.all or not visibility.slots:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if visibility is not None and visibility.slots:
            keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
            paged_attention(
                query,
                keys,
                values,
                attn_metadata.block_table,
                attn_metadata.seq_lens,
                attn_metadata.query_start_loc,
                visibility.requests,
                visibility.enter,
                visibility.exit,
                self.scale,
                output,
                visibility.slots,
                attn_metadata.max_seq_len,
            )
        return output


class StepAttentionBackend(FlashAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[StepAttentionImpl]:
        return StepAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        return StepMetadataBuilder
