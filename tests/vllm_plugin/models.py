"""Tiny random checkpoints that vLLM's CPU build can run: its attention wants heads of 32 at least."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tidar.config import TidarConfig
from tidar.model import attention
from tidar.model.drafter import Drafter, DrafterSpec

VOCABULARY, CONTEXT = 256, 256


def tiny_checkpoint(
    folder: Path, arch: str = "llama", lossless: bool = True, block_size: int = 4, vocabulary: int = VOCABULARY
) -> str:
    """A checkpoint as `save_pretrained(with_base=True)` writes it: lossless with its drafter inside, or all-weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        arch,
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float32)
    entry = TidarConfig(block_size=block_size)
    if not lossless:
        entry = TidarConfig(block_size=block_size, objective="paper", mask_token_id=vocabulary - 1)
        lm.config.tidar = entry.to_dict()
    lm.save_pretrained(folder)
    if lossless:
        drafter = Drafter(lm, DrafterSpec(4, 8.0, None, sampler_width=8))
        for name, parameter in drafter.named_parameters():
            if "lora_B" in name or name in ("sampler_head.out.weight", "mask_embedding"):
                torch.nn.init.normal_(parameter, std=0.3)
        drafter.save(folder / "drafter", str(folder), entry, torch.float32)
    return str(folder)


def some_prompt(length: int, seed: int) -> list[int]:
    return torch.randint(VOCABULARY - 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
