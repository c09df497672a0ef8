"""Models to time: real ones, or random weights at the shapes of real ones, which need no download."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tidar.config import TidarConfig
from tidar.errors import TidarError
from tidar.model import attention, hub
from tidar.model.drafter import Drafter, DrafterSpec
from tidar.model.network import Network
from tidar.model.quantised import check_kind

RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "random:qwen3-8b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
        },
    ),
    "random:qwen2.5-1.5b": (
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
    "random:smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
}


def build(name: str, drafter: bool, device: str | None, dtype: str | None, weights: str | None = None) -> Network:
    """A network to time, for text it may never see.

    Args:
        name: anything `model.hub.load` takes, or a key of RANDOM.
        drafter: with a gated drafter (a lossless conversion); without one, masks are a vocabulary entry (the paper's
            all-weights conversion). For a real model that has a drafter, False takes it away.
        device, dtype, weights: as in `hub.load`.

    Raises:
        TidarError: for an unknown name.
    """
    if name not in RANDOM:
        if name.startswith("random:"):
            raise TidarError(f"{name} is not known; there are {', '.join(RANDOM)}")
        stored = None if drafter else "none"
        network, _, _ = hub.load(name, drafter=stored, device=device, dtype=dtype, weights=weights)
        if not drafter:
            network.config = TidarConfig(8, "paper", mask_token_id=0)
        return network
    check_kind(weights)
    kind, sizes = RANDOM[name]
    place = hub.resolve_device(device)
    precision = hub.resolve_dtype(dtype, place)
    config = AutoConfig.for_model(kind, **sizes)
    with place:
        lm = AutoModelForCausalLM.from_config(config, dtype=precision, attn_implementation=attention.NAME)
    network = Network(lm.eval().requires_grad_(False), config=TidarConfig(8, "paper", mask_token_id=0))
    if drafter:
        network.drafter, network.config = Drafter(lm, DrafterSpec()).to(place, precision), TidarConfig(8)
    if weights is not None:
        network.quantise(weights)
    return network


def weight_bytes(network: Network) -> int:
    """Bytes of weights that one forward reads, as they are kept."""
    return sum(p.nbytes for p in _read(network))


def weight_count(network: Network) -> int:
    """Numbers in the weights that one forward reads."""
    return sum(p.numel() for p in _read(network))


def _read(network: Network) -> list[Tensor]:
    """Every layer and the output embedding, not the input embedding."""
    layers = [p for name, p in network.backbone.named_parameters() if "embed" not in name]
    return [*layers, *network.lm.get_output_embeddings().parameters()]


def cache_bytes(network: Network, tokens: int) -> int:
    """Bytes of keys and values of `tokens` cached tokens."""
    config = network.lm.config.get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * dim * tokens * network.lm.dtype.itemsize)
