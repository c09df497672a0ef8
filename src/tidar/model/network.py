"""A causal LM that can run any `Layout`: clean tokens and mask blocks through the stock transformers modules."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.utils.parametrize import type_before_parametrizations
from transformers import PreTrainedModel

from tidar.config import TidarConfig
from tidar.errors import TidarError
from tidar.layout import Layout
from tidar.model.attention import half
from tidar.model.drafter import Drafter
from tidar.model.fused import FusedBackbone, fusable, fuse
from tidar.model.packed import PackedBackbone
from tidar.model.quantised import check_kind, kernel_reads, quantise_model

Mask = Tensor | BlockMask
MASKED = -1
"""Stands for a mask among the token ids of a block."""


class Network(nn.Module):
    """A transformers causal LM, unchanged, plus what drafts for it.

    Attributes:
        lm: the causal LM (its `attn_implementation` must be "tidar").
        drafter: the gated drafter of a lossless conversion; None for an all-weights or a plain model.
        config: how it was converted; None for a plain causal LM, which can only decode autoregressively.
        weights: what the base weights are quantised to, "int8" or "fp8"; None for what they were.
        fused: the backbone as few large kernels (see fused.py; packed.py on a CPU), used by forwards over a row cache.
        fused_from: the network's `state()` that it was built from.
        runner: captured steps, kept between runs (see decode/runner.py).
        learned: what drafts turned out to be worth, by how tokens are sampled (see decode/planner.py).
    """

    def __init__(self, lm: PreTrainedModel, drafter: Drafter | None = None, config: TidarConfig | None = None) -> None:
        super().__init__()
        self.lm, self.drafter, self.config = lm, drafter, config
        self.weights: str | None = None
        self.fused: FusedBackbone | PackedBackbone | None = None
        self.fused_from: object | None = None
        self.runner: object | None = None
        self.learned: dict[object, Any] = {}

    @property
    def can_draft(self) -> bool:
        return self.drafter is not None or (
            self.config is not None and self.config.drafts and self.config.mask_token_id is not None
        )

    @property
    def causal_blocks(self) -> bool:
        """Whether a mask sees only the earlier ones of its block (see `chain_layout`)."""
        return self.config is not None and self.config.block_attention == "causal"

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def max_positions(self) -> int | None:
        """Longest context in tokens, None where the model names no limit."""
        return getattr(self.lm.config.get_text_config(), "max_position_embeddings", None)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end an answer, by the model's generation config (the loader adds the tokenizer's)."""
        ids = self.lm.generation_config.eos_token_id
        return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])

    @property
    def vocabulary(self) -> int:
        """Rows of the output embedding."""
        return int(self.lm.get_output_embeddings().out_features)

    @property
    def backbone(self) -> nn.Module:
        return self.lm.get_submodule(self.lm.base_model_prefix)

    def quantise(self, weights: str) -> None:
        """Quantise the base weights to "int8" or "fp8", in place; install the drafter before.

        Where our kernel streams such numbers (a Llama-like model on a GPU), they replace the weights; elsewhere the
        weights are rounded to them and stay in the model's dtype, which is the same model but no faster.

        Raises:
            TidarError: for another kind, or a model without linear layers.
        """
        check_kind(weights)
        keep_numbers = fusable(self.backbone) and kernel_reads(weights, self.device, self.lm.dtype)
        quantise_model(self.lm, weights, keep_numbers)
        self.weights = weights

    def build_fused(self) -> FusedBackbone | PackedBackbone | None:
        """The backbone's fused twin, where it has one. It copies the drafter: build it after training."""
        fused = fuse(self.backbone)
        if fused is None or self.device.type != "cpu":
            return fused
        return PackedBackbone(fused, self.lm.get_output_embeddings())

    def state(self) -> list[tuple[int, int]]:
        """Changes whenever a weight does: place in memory and version of every parameter."""
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters()]

    def embed(self, ids: Tensor) -> Tensor:
        return self.lm.get_input_embeddings()(ids)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states [..., H]; float32 where the backbone is fused on a GPU."""
        output = self.lm.get_output_embeddings()
        if isinstance(self.fused, PackedBackbone):
            return self.fused.head(hidden) if torch.is_inference_mode_enabled() else output(hidden)
        if (
            self.fused is not None
            and type_before_parametrizations(output) is nn.Linear
            and torch.is_inference_mode_enabled()
        ):
            return self.fused.head(hidden, output)
        return output(hidden)

    def mask_vector(self) -> Tensor:
        """[H] input embedding of a mask token. Raises TidarError for a model that has none."""
        if self.drafter is not None:
            return self.drafter.mask_embedding
        if self.config is not None and self.config.mask_token_id is not None:
            return self.lm.get_input_embeddings().weight[self.config.mask_token_id]
        raise TidarError("this model has no mask token, free or learned: convert it first with `tidar train`")

    def forward(
        self,
        ids: Tensor,
        layout: Layout,
        cache: object | None = None,
        mask: Mask | None = None,
        fused: bool = False,
        block_ids: Tensor | None = None,
    ) -> Tensor:
        """Run one layout.

        Args:
            ids: [B, layout.clean] token ids.
            layout: positions and visibility; its mask blocks are appended to the clean tokens.
            cache: KV cache whose slots `[prefix, prefix + N)` take this forward's keys (see decode/cache.py).
            mask: the layout's mask of the tokens that need one (see `Layout.masked`), or of all, where the caller has
                it in another form; dense by default.
            fused: take the fused backbone, if there is one and it does so many tokens well; needs a row cache.
            block_ids: [B, blocks * K] the tokens that blocks show, `MASKED` for a mask; all masks by default.

        Returns:
            [B, N, H] final hidden states; the first `layout.clean` are the causal model's own.
        """
        embedded = self.embed(ids)
        if layout.size > layout.clean:
            embedded = torch.cat((embedded, self._embed_blocks(layout, embedded, block_ids)), 1)
        position = self._position(layout)
        if self.fused is not None and fused and layout.size <= self.fused.most_slots:
            return self.fused(embedded, layout, position, cache)
        if mask is None and cache is not None:
            mask = layout.dense_mask(cache.width)  # type: ignore[attr-defined]
        elif mask is None and layout.masked.start < layout.size:
            mask = layout.dense_mask()[:, :, layout.masked]
        with self._gate(layout.clean):
            return self._run(embedded, mask, position, cache)

    def halves(
        self,
        ids: Tensor,
        layout: Layout,
        masks: tuple[Mask | None, Mask] | None = None,
        block_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What `forward` gives, without a cache, where only the drafter trains: clean tokens see nothing that it does.

        So they run first, without a gradient and with nothing kept for one but keys and values; then the blocks do.

        Args:
            ids, layout, block_ids: see `forward`; there must be blocks.
            masks: of the clean tokens (None where they are one chain) and of the blocks, for FlexAttention.

        Returns:
            final hidden states of the clean tokens [B, clean, H], detached, and of the blocks [B, blocks * K, H].
        """
        clean, position = layout.clean, self._position(layout)
        if masks is None:
            dense = layout.dense_mask()
            masks = None if layout.one_chain else dense[:, :, :clean, :clean], dense[:, :, clean:]
        with torch.no_grad(), half("clean"):
            embedded = self.embed(ids)
            states = self._run(embedded, masks[0], position[:, :clean])
        with half("blocks"), self._gate(0):
            blocks = self._embed_blocks(layout, embedded, block_ids).contiguous()  # or layers compile once more
            return states, self._run(blocks, masks[1], position[:, clean:])

    def _embed_blocks(self, layout: Layout, like: Tensor, block_ids: Tensor | None) -> Tensor:
        """[B, blocks * K, H]: the mask vector, or tokens that blocks show."""
        tail = self.mask_vector().to(like.dtype).expand(len(like), layout.size - layout.clean, -1)
        if block_ids is None:
            return tail
        return torch.where(block_ids[..., None] == MASKED, tail, self.embed(block_ids.clamp(min=0)))

    def _position(self, layout: Layout) -> Tensor:
        if self.max_positions is None:
            return layout.position
        # Masks (and drafts not yet judged) may stand past the context's end; no token there is ever committed.
        return layout.position.clamp(max=self.max_positions - 1)

    def _gate(self, start: int) -> AbstractContextManager[None]:
        return nullcontext() if self.drafter is None else self.drafter.gate.opened(start)

    def _run(self, embedded: Tensor, mask: Mask | None, position: Tensor, cache: object | None = None) -> Tensor:
        """The stock modules."""
        output = self.backbone(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=position,
            use_cache=cache is not None,
            **{cache_name(type(self.backbone).forward): cache},
        )
        return output.last_hidden_state


@functools.cache
def cache_name(forward: Callable) -> str:
    """What a model calls its cache: transformers has renamed it in 5.24, models outside it may not have."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
