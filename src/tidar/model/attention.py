"""The attention that our masks go through, registered with transformers as "tidar".

A 4-D boolean mask runs as grouped SDPA, a BlockMask as FlexAttention, no mask as transformers' stock causal SDPA, so a
model loaded with `attn_implementation="tidar"` is also an ordinary causal LM.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "tidar"


class _Halves:
    """Which half of a forward in two halves is running: "clean" keeps its keys and values, "blocks" sees them too."""

    running: str | None = None


_halves = _Halves()


@contextmanager
def half(name: str | None) -> Iterator[None]:
    """Run one half of a forward; None, as ever, a whole one."""
    before, _halves.running = _halves.running, name
    try:
        yield
    finally:
        _halves.running = before


def forget(model: nn.Module) -> None:
    """Give back the memory of what clean halves have kept."""
    for module in model.modules():
        module.__dict__.pop("clean_key", None)
        module.__dict__.pop("clean_value", None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query [B, H, N, D] over key and value [B, H_kv, S, D]; returns ([B, N, H, D], None).

    A mask may have fewer rows than there are queries: the ones before are a chain, causal among themselves, for which
    there are faster kernels than FlexAttention's.
    """
    if _halves.running == "clean":
        module.clean_key, module.clean_value = key, value
    elif _halves.running == "blocks":
        kept: Any = module
        key, value = torch.cat((kept.clean_key, key), 2), torch.cat((kept.clean_value, value), 2)
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    if chain := query.shape[2] - attention_mask.shape[-2]:
        first = (x[:, :, :chain] for x in (query, key, value))
        before, _ = sdpa_attention_forward(module, *first, None, scaling=scaling, **kwargs)
        after, _ = attention(module, query[:, :, chain:], key, value, attention_mask, scaling, **kwargs)
        return torch.cat((before, after), 1), None
    if isinstance(attention_mask, BlockMask):
        grouped = query.shape[1] != key.shape[1]
        output = flex_attention(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped)
    else:
        output = grouped_sdpa(query, key, value, attention_mask, scaling)
    return output.transpose(1, 2), None


def grouped_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Masked SDPA in which the query heads of a group are rows of one head, so that keys are not repeated.

    query [B, H, N, D], key and value [B, H_kv, S, D], mask [B, 1, N, S] bool -> [B, H, N, D].
    """
    batch, heads, tokens, dim = query.shape
    groups = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], groups * tokens, dim)
    output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask.repeat(1, 1, groups, 1), scale=scaling)
    return output.reshape(batch, heads, tokens, value.shape[-1])


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
