"""How fast training is, against what the device could do: model FLOPs of a row, by definition, not by measurement."""

from __future__ import annotations

import resource
from typing import NamedTuple

import torch
from torch import nn

from tidar.model.drafter import Drafter
from tidar.train.conversion import Conversion

PEAK_BF16 = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bfloat16 FLOP/s by part of the device's name, as their makers state them; the first that fits counts."""


def peak_flops(device: torch.device) -> float | None:
    """What the device could do at best, None where the table does not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


def model_flops(module: Conversion, length: int, blocks: int) -> float:
    """Floating-point operations that one row of `length` clean tokens and `blocks` blocks needs, both ways.

    A product with W weights costs 2 W a token. S clean tokens, M mask tokens, N backbone weights in linear layers, V H
    the output embedding, A(x) the attention of x tokens: 4 x width operations for each visible key, in each layer;
    a clean token sees S / 2 keys, a mask S / 2 + K (packed documents are not told apart).

    - paper: all weights train, so everything counts three times (forward, gradient of inputs, gradient of weights):
      3 (2 N + 2 V H) (S + M) + 3 A(S + M). With all tiles M is about S: twice the usual 6 N a clean token. A term of
      weight 0 needs no output embedding. ar: the same with M = 0; block-diffusion: the same without the AR term.
    - lossless: clean tokens need a forward only, 2 N S + A(S). Masks need forward and the gradient of inputs, as the
      base is frozen, 2 (2 N M + A(M)), and three times the drafter's own weights. The output embedding is used once
      for the teacher, without a backward, and twice for each student (the masks; with a sampler head, its states too).

    Recomputation (of logits or layers) is not model work and does not count.
    """
    network = module.network
    text = network.lm.config.get_text_config()
    block, drafter = module.block_size, network.drafter
    masks = 0 if module.objective == "ar" else blocks * block
    head = text.vocab_size * text.hidden_size
    own = _adapter_weights(drafter)
    linear = sum(m.weight.numel() for m in network.backbone.modules() if isinstance(m, nn.Linear)) - own.lora
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    attend = 4 * width * text.num_hidden_layers
    clean_attention, mask_attention = attend * length * length / 2, attend * masks * (length / 2 + block)
    if module.objective != "lossless":
        judged = sum(tokens for tokens, weight in zip((length, masks), module.term_weights, strict=True) if weight)
        return 3 * (2 * linear * (length + masks) + 2 * head * judged + clean_attention + mask_attention)
    students = 1 if own.sampler == 0 else 2
    return (
        2 * linear * length
        + clean_attention
        + 2 * (2 * linear * masks + mask_attention)
        + 6 * (own.lora + own.sampler) * masks
        + 2 * head * masks * (1 + 2 * students)
    )


class _Own(NamedTuple):
    """How many weights a drafter adds."""

    lora: int
    sampler: int


def _adapter_weights(drafter: Drafter | None) -> _Own:
    if drafter is None:
        return _Own(0, 0)
    head = drafter.sampler_head
    sampler = 0 if head is None else sum(p.numel() for p in head.parameters())
    return _Own(sum(p.numel() for p in drafter.lora.parameters()), sampler)


def peak_memory(device: torch.device) -> float:
    """GiB that this process has held at most: on the GPU, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
