"""From a block's mask states to draft tokens: plain one-step diffusion, or one walk of the sampler head."""

from __future__ import annotations

import torch
from torch import Tensor

from tidar.model.network import Network
from tidar.sampling import SamplingParams, draw

CANDIDATES = 64
"""Tokens a position that the sampler head re-scores: the likeliest of the mask's own logits."""


def propose(
    network: Network, block: Tensor, first: Tensor, params: SamplingParams, noise: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Draft K tokens from one outcome block.

    Args:
        block: [B, K, H] final hidden states of the block's masks.
        first: [B] d_1, the verified next token.
        noise: [B, K-1] uniform in [0, 1), None for greedy.

    Returns:
        drafts [B, K] with drafts[:, 0] = first, and the distributions [B, K-1, V] that the others were drawn from
        (None for greedy: drafts are the argmax).
    """
    logits = network.head(block[:, 1:])
    head = network.drafter.sampler_head if network.drafter is not None else None
    if head is None:
        if params.greedy:
            return torch.cat((first[:, None], logits.argmax(-1)), 1), None
        assert noise is not None
        probs = params.probabilities(logits)
        return torch.cat((first[:, None], draw(probs, noise)), 1), probs

    # The head only re-ranks: scoring a few candidates a position costs a gather instead of a pass over the vocabulary.
    output = network.lm.get_output_embeddings()
    candidates = logits.topk(min(CANDIDATES, logits.shape[-1]), -1).indices
    rows, bias = output.weight[candidates], output.bias[candidates] if output.bias is not None else None
    state = torch.zeros_like(block[:, 0], dtype=torch.float32)
    drafts, drawn_from = [first], list[Tensor]()
    for m in range(block.shape[1] - 1):
        inputs = head.inputs(block[:, m + 1], network.embed(drafts[-1]))
        state = head.advance(state, inputs)
        rescored = (block[:, m + 1] + state.to(block.dtype))[:, None]
        scores = (rows[:, m] @ rescored.transpose(1, 2))[..., 0]
        if bias is not None:
            scores = scores + bias[:, m]
        if params.greedy:
            chosen = scores.argmax(-1)
        else:
            assert noise is not None
            weights = params.probabilities(scores)
            drawn_from.append(weights)
            chosen = draw(weights, noise[:, m])
        drafts.append(candidates[:, m].gather(1, chosen[:, None])[:, 0])
    tokens = torch.stack(drafts, 1)
    if params.greedy:
        return tokens, None
    stacked = torch.stack(drawn_from, 1)
    full = torch.zeros_like(logits, dtype=stacked.dtype).scatter_(-1, candidates, stacked)
    return tokens, full
