"""Likelihood of a text under a diffusion model: its bound by Monte Carlo, as LLaDA does for multiple choice.

A masked diffusion model has no cheap likelihood, only an upper bound of -log p that is an average over random masks
(LLaDA, arXiv 2502.09992, Eq. 6 and its Algorithm 3; the method of the diffusion rows in the paper's Table 3). Block by
block (BD3-LM, arXiv 2503.09573) the bound is the sum over blocks of

    E_n E_masks [ k / n * sum of -log p(masked token | shown tokens, blocks before) ],    n uniform in 1 .. k

where k tokens of the block belong to the continuation and n of them are masked. It is what training minimises.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar.errors import TidarError
from tidar.layout import Layout, block_causal_layout
from tidar.model.network import MASKED, Network
from tidar.train.objective import diffusion_weights, random_masks

SAMPLES = 128
"""Draws of the paper's Table 3."""
TOKENS = 4096
"""Most tokens of one forward, all rows together."""


class Likelihood(NamedTuple):
    """A Monte Carlo estimate.

    log_likelihood: lower bound of log p(continuation | context), in nats. standard_error: of that mean, in nats.
    samples: draws.
    """

    log_likelihood: float
    standard_error: float
    samples: int


@torch.inference_mode()
def log_likelihood(
    network: Network, context: list[int], continuation: list[int], samples: int = SAMPLES, seed: int = 0
) -> Likelihood:
    """The bound for `continuation` after `context` (token ids; the context may be empty).

    Every draw masks all blocks at once, each in its own way, in one row of the training layout.

    Raises:
        TidarError: for a model that is no block-diffusion model, fewer than 2 samples, or a text that is empty or
            longer than the model's context.
    """
    if network.config is None or network.config.objective != "block-diffusion":
        raise TidarError("Monte Carlo likelihood is for block-diffusion models; causal ones have an exact likelihood")
    check_samples(samples)
    size, text = network.config.block_size, context + continuation
    if not continuation:
        raise TidarError("the continuation is empty: give at least one token")
    if network.max_positions is not None and len(text) > network.max_positions:
        raise TidarError(f"the text has {len(text)} tokens, but the model's context is {network.max_positions}")
    first, last = len(context) // size, (len(text) - 1) // size
    clean = last * size  # nobody's context reaches into the last block
    anchors = torch.arange(first, last + 1)[None] * size - 1
    layout = block_causal_layout(clean, anchors.to(network.device), size)
    places = anchors[0, :, None] + torch.arange(1, size + 1)
    inside = places < len(text)
    blocks = Blocks(torch.tensor(text)[places.clamp(max=len(text) - 1)], inside, inside & (places >= len(context)))
    ids, generator = torch.tensor([text[:clean]], dtype=torch.long), torch.Generator().manual_seed(seed)
    most, bounds = max(1, TOKENS // layout.size), list[Tensor]()
    for done in range(0, samples, most):
        counted = blocks.counted.expand(min(most, samples - done), -1, -1)
        bounds.append(_bounds(network, layout, ids, blocks, random_masks(counted, generator)))
    values = torch.cat(bounds)
    return Likelihood(-float(values.mean()), float(values.std()) / math.sqrt(samples), samples)


def check_samples(samples: int) -> None:
    """Raise TidarError for too few draws."""
    if samples < 2:
        raise TidarError(f"samples is {samples}, but a standard error needs at least 2")


class Blocks(NamedTuple):
    """The blocks that hold a text's continuation, each [blocks, K]: token ids, which of them exist, which count."""

    tokens: Tensor
    inside: Tensor
    counted: Tensor


def _bounds(network: Network, layout: Layout, ids: Tensor, blocks: Blocks, masked: Tensor) -> Tensor:
    """[R] float64: for each draw of masks [R, blocks, K], the value whose mean bounds -log p.

    layout: one row, of the clean tokens `ids` [1, S] and all blocks.
    """
    rows, device = len(masked), network.device
    shown = torch.where(masked | ~blocks.inside, MASKED, blocks.tokens)
    layout = layout.after(torch.zeros(rows, dtype=torch.long, device=device))
    hidden = network(ids.expand(rows, -1).to(device), layout, block_ids=shown.flatten(1).to(device))
    chosen = masked.flatten(1)
    logits = network.head(hidden[:, layout.clean :][chosen.to(device)])
    labels = blocks.tokens.flatten().expand(rows, -1)[chosen]
    losses = F.cross_entropy(logits.float(), labels.to(device), reduction="none").cpu().double()
    weights = diffusion_weights(blocks.counted.expand_as(masked), masked).flatten(1)
    return torch.zeros(chosen.shape, dtype=torch.float64).masked_scatter_(chosen, losses).mul_(weights).sum(1)
