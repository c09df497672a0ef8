"""From a block's mask states to draft tokens: plain one-step diffusion, or one walk of the sampler head."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar.kernels.draft import (
    ALTERNATIVES,
    Walk,
    candidates_eager,
    draft,
    draft_plain,
    draft_plain_eager,
    fold,
)
from tidar.model.fused import FusedBackbone
from tidar.model.network import Network
from tidar.model.quantised import stored_weight
from tidar.sampling import DraftProbs, Sampling, draw

CANDIDATES = 128
"""Tokens a position that can be drafted: two of each group of the vocabulary, the likeliest by the mask's own logits,
re-scored by the sampler head."""


class Proposal(NamedTuple):
    """Draft tokens of one block.

    drafts [B, K], the first already decided; confidence [B, K-1], the drafter's own probability of the others
    (float32, before temperature); alternatives [B, K-1, ALTERNATIVES], the next best tokens for each of them; probs,
    what they were drawn from, None for greedy drafts.
    """

    drafts: Tensor
    confidence: Tensor
    alternatives: Tensor
    probs: DraftProbs | None


def propose(
    network: Network,
    block: Tensor,
    logits: Tensor,
    first: Tensor,
    after: Tensor,
    params: Sampling,
    noise: Tensor | None,
) -> Proposal:
    """Draft K tokens from one outcome block.

    Args:
        block: [B, K, H] final hidden states of the block's masks.
        logits: [B, K-1, V] of all but the first of them.
        first: [B] d_1, the verified next token.
        after: [B] d_2 where the verifier has decided it already, else -1.
        noise: [B, K-1] uniform in [0, 1), None for greedy.
    """
    head = network.drafter.sampler_head if network.drafter is not None else None
    if params.greedy and head is None and network.vocabulary > ALTERNATIVES:
        plain = draft_plain if _kernels(network) else draft_plain_eager
        return Proposal(*plain(logits, first, after), None)
    if params.greedy and (walk := _walk(network)) is not None:
        return Proposal(*draft(walk, block, logits, first, after, CANDIDATES), None)
    # The head only re-ranks: scoring a few candidates a position costs a gather instead of a pass over the vocabulary.
    scores, candidates = candidates_eager(logits, CANDIDATES)
    state = torch.zeros_like(block[:, 0], dtype=torch.float32)
    output = network.lm.get_output_embeddings()
    if head is not None:
        rows = stored_weight(output)[candidates].to(block.dtype)
        bias = output.bias[candidates] if output.bias is not None else None
    drafts, confidence, others, drawn_from = [first], list[Tensor](), list[Tensor](), list[Tensor]()
    for m in range(block.shape[1] - 1):
        score = scores[:, m]
        if head is not None:
            state = head.advance(state, head.inputs(block[:, m + 1], network.embed(drafts[-1])))
            rescored = (block[:, m + 1] + state.to(block.dtype))[:, None]
            score = (rows[:, m] @ rescored.transpose(1, 2))[..., 0]
            if bias is not None:
                score = score + bias[:, m]
        if params.greedy:
            chosen = score.argmax(-1)
        else:
            assert noise is not None
            weights = params.probabilities(score)
            drawn_from.append(weights)
            chosen = draw(weights, noise[:, m])
        token, sure = (t.gather(1, chosen[:, None])[:, 0] for t in (candidates[:, m], score.float().softmax(-1)))
        if m == 0:
            token, sure = torch.where(after < 0, token, after), torch.where(after < 0, sure, 1.0)
        drafts.append(token)
        confidence.append(sure)
        others.append(_next_best(score, candidates[:, m], chosen))
    probs = None if params.greedy else DraftProbs(candidates, torch.stack(drawn_from, 1))
    return Proposal(torch.stack(drafts, 1), torch.stack(confidence, 1), torch.stack(others, 1), probs)


def _next_best(score: Tensor, candidates: Tensor, chosen: Tensor) -> Tensor:
    """[B, ALTERNATIVES] the best of candidates [B, C] by score [B, C] but for the chosen ones; 0 if there are few."""
    rest = score.scatter(1, chosen[:, None], -torch.inf)
    found = candidates.gather(1, rest.topk(min(ALTERNATIVES, rest.shape[1] - 1), 1).indices)
    return F.pad(found, (0, ALTERNATIVES - found.shape[1]))


def _kernels(network: Network) -> bool:
    return isinstance(network.fused, FusedBackbone) and network.fused.kernels


def _walk(network: Network) -> Walk | None:
    """The sampler head as kernels, kept with the fused backbone; None where the loop above is all there is."""
    fused = network.fused
    if not _kernels(network) or network.vocabulary <= CANDIDATES:
        return None
    assert isinstance(fused, FusedBackbone)
    if fused.walk is None:
        fused.walk = fold_head(network)
    return fused.walk


def fold_head(network: Network) -> Walk | None:
    """The network's sampler head as the kernels take it, if it has one. It is a copy: build it after training."""
    head = network.drafter.sampler_head if network.drafter is not None else None
    if head is None:
        return None
    output = network.lm.get_output_embeddings()
    return fold(
        head.hidden_in.weight,
        head.token_in.weight,
        head.state_in.weight,
        head.out.weight,
        network.embed,
        stored_weight(output),
        output.bias,
        network.lm.dtype,
    )
