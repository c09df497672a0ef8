"""The losses, as pure functions of hidden states and logits: the paper's and the lossless one.

Every term comes as a sum with its count; dividing happens once, by the global count over ranks and accumulation steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class TokenTerms(NamedTuple):
    """Per token, each [M] float32: loss (differentiable), overlap = sum_v min(p, q) in [0, 1], and argmax agreement."""

    loss: Tensor
    overlap: Tensor
    match: Tensor


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> TokenTerms:
    """Cross-entropy of the drafter's logits [M, V] to the AR model's distribution, softmax of `teacher` [M, V].

    A temperature below 1 sharpens the teacher towards the token that greedy decoding will take.
    """
    student, teacher = student.float(), teacher.float()
    log_q = student.log_softmax(-1)
    p = (teacher / temperature).softmax(-1)
    overlap = torch.minimum(p, log_q.detach().exp()).sum(-1)
    match = (student.argmax(-1) == teacher.argmax(-1)).float()
    return TokenTerms(-(p * log_q).sum(-1), overlap, match)


def hard_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [M] of logits [M, V] to token ids [M]."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def acceptance_weights(overlap: Tensor, valid: Tensor) -> Tensor:
    """Weights [..., K] of a block's positions by what they contribute to the accepted length (D-PACE).

    The expected number of accepted drafts is sum_m prod_{2<=i<=m} q_i, and its derivative by log q_m is the suffix sum
    of those products from m on. q is the smoothed acceptance probability 0.5 * overlap + 0.5. The first position is
    never judged (the verifier supplies that token), so it has the weight of the last one, which keeps "trust" mixing
    trained. Weights are divided by K, not by their own mean, so that they add up over ranks.

    Args:
        overlap: [..., K] detached acceptance probabilities.
        valid: [..., K] bool; positions that do not exist weigh nothing.
    """
    smoothed = torch.where(valid, 0.5 * overlap + 0.5, 0.0)
    products = smoothed[..., 1:].cumprod(-1)
    suffix = products.flip(-1).cumsum(-1).flip(-1) / overlap.shape[-1]
    return torch.cat((suffix[..., -1:], suffix), -1) * valid


def paper_loss(
    ar_sum: Tensor,
    ar_count: Tensor,
    diffusion_sum: Tensor,
    diffusion_count: Tensor,
    ar_weight: float,
    diffusion_weight: float,
) -> Tensor:
    """(ar_weight * mean AR loss + diffusion_weight * mean mask loss) / (ar_weight + diffusion_weight), Sec. 3.2."""
    ar, diffusion = ar_sum / ar_count.clamp(min=1), diffusion_sum / diffusion_count.clamp(min=1)
    return (ar_weight * ar + diffusion_weight * diffusion) / (ar_weight + diffusion_weight)


def chunked(terms: Callable[..., tuple[Tensor, ...]], chunk: int, recompute: bool, *inputs: Tensor) -> list[Tensor]:
    """Apply `terms` to rows of the inputs [M, ...] a chunk at a time and concatenate its outputs [M].

    With `recompute`, logits are made again in the backward pass, so that those of the whole batch never exist at once.
    """
    outputs = []
    for start in range(0, len(inputs[0]), chunk):
        piece = [x[start : start + chunk] for x in inputs]
        outputs.append(checkpoint(terms, *piece, use_reentrant=False) if recompute else terms(*piece))
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)]
