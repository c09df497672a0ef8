"""What the page says about a model."""

from __future__ import annotations

from typing import Any

from tidar import __version__
from tidar.api import TidarModel


def describe(model: TidarModel, name: str) -> dict[str, Any]:
    """What is known of a model before it runs."""
    network, config = model.network, model.config
    return {
        "model": name,
        "device": str(network.device.type),
        "dtype": str(network.lm.dtype).removeprefix("torch."),
        "block_size": config.block_size if config is not None else None,
        "can_draft": network.can_draft,
        "context": network.max_positions,
        "tidar": __version__,
    }
