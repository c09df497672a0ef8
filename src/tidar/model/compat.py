"""Which causal LMs can work, said before anything runs: config checks, then a probe of the model's actual behaviour."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from tidar.errors import TidarError, first_line
from tidar.layout import chain_layout, prefill_layout
from tidar.model.network import Network


def check_config(name: str, config: PretrainedConfig) -> None:
    """Refuse architectures whose attention cannot carry our mask. Raises TidarError with one sentence."""
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise TidarError(f"{name} is an encoder-decoder model; tidar converts decoder-only causal language models")
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        raise TidarError(
            f"{name} has {', '.join(sorted(kinds))} layers; tidar handles full causal attention only for now"
        )
    window, limit = getattr(text, "sliding_window", None), getattr(text, "max_position_embeddings", None)
    if window is not None and (limit is None or window < limit) and getattr(text, "use_sliding_window", True):
        raise TidarError(f"{name} has sliding-window attention ({window} tokens), which tidar does not handle yet")


def probe(name: str, network: Network) -> None:
    """Refuse a model that cannot carry mask blocks, by running it on a few tokens (see `_probe`).

    Raises:
        TidarError: naming what it does wrong.
    """
    try:
        _probe(name, network)
    except TidarError:
        raise
    except Exception as error:  # whatever foreign model code makes of a 4-D mask, position ids or a gated layer
        raise TidarError(f"{name} cannot run with tidar's attention mask and positions: {first_line(error)}") from error


@torch.inference_mode()
def _probe(name: str, network: Network) -> None:
    """Run tiny inputs and refuse a model that ignores our mask or position ids, or whose head we would skip.

    Checks that (1) backbone + output embedding are the model's logits, (2) clean tokens do not notice mask blocks, and
    (3) a block's states depend on its context and positions alone, not on where the tokens lie in memory.

    Raises:
        TidarError: naming the first check that failed.
    """
    vocabulary = network.lm.config.get_text_config().vocab_size
    ids = (torch.arange(6, device=network.device) * 7 + 1)[None] % vocabulary
    plain = network.lm(ids, use_cache=False).logits
    if not network.can_draft:
        bare = network.head(network(ids, prefill_layout(torch.tensor([6], device=ids.device), 6, 0)))
        _same(name, bare, plain, "changes its logits after the output embedding or ignores a 4-D attention mask")
        return
    block = 3
    anchors = torch.tensor([[1, 4]], device=ids.device)
    train = network(ids, chain_layout(6, anchors, block))
    _same(
        name, network.head(train[:, :6]), plain, "lets causal tokens see mask tokens, or changes its logits afterwards"
    )
    alone = network(ids[:, :2], prefill_layout(torch.tensor([2], device=ids.device), 2, block))
    _same(name, alone[:, 2:], train[:, 6 : 6 + block], "does not take its positions from position_ids alone")


def _same(name: str, got: torch.Tensor, wanted: torch.Tensor, otherwise: str) -> None:
    tolerance = 0.05 if got.dtype in (torch.bfloat16, torch.float16) else 1e-3
    error = (got.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-9)
    if not error < tolerance:
        raise TidarError(f"{name} cannot be a TiDAR model: it {otherwise} (relative error {error:.2g})")
