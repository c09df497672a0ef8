"""What a step decides about its rows: which outcomes to draft for, which drafts stand, which masks draft next.

These are a few numbers a row; as separate operations they are some fifty launches, a tenth of a small model's step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tidar.kernels.launch import available, options, tl, triton
from tidar.sampling import Leaves, Verdict, accept_greedy, likely_outcomes


class Decision(NamedTuple):
    """What follows from a verdict, for B rows.

    next_token, after: [B] as in `Verdict`. masks: [B, K] which of the forward's B * N tokens draft next; the first
    predicts the position of the next token. drafted: [B] how many of the next drafts are any. result: [B, 3 + K] what
    the host wants to know (see `decode.step.StepResult`).
    """

    next_token: Tensor
    after: Tensor
    masks: Tensor
    drafted: Tensor
    result: Tensor


class Judged(NamedTuple):
    """What was judged.

    drafts: [B, K], of which drafted [B] are any and the first known [B] were certain. anchors: [B, n], the drafts
    (0..K-1) that blocks continue, ascending. active: [B] bool. slots: N, tokens a row; clean: those before the blocks.
    """

    drafts: Tensor
    drafted: Tensor
    known: Tensor
    anchors: Tensor
    active: Tensor
    slots: int
    clean: int


def decide_eager(verdict: Verdict, judged: Judged, block_size: int) -> Decision:
    """The block of the true outcome drafts next.

    If it was pruned, the nearest earlier outcome's does, by what it says beyond the tokens that are known by now; if
    there is none, nothing was drafted but the next token, and the one after it if a leaf told.
    """
    accepted, next_token, after = verdict
    drafts, drafted, known, anchors, active, slots, clean = judged
    if anchors.shape[1]:
        rows, places = (torch.arange(n, device=accepted.device) for n in (len(accepted), block_size))
        nearest = (anchors < accepted[:, None]).sum(1) - 1
        index = nearest.clamp(min=0)
        late = (accepted - 1 - anchors.gather(1, index[:, None])[:, 0]).clamp(min=0)
        place = (late[:, None] + places).clamp(max=block_size - 1)
        masks = (rows * slots + clean + index * block_size)[:, None] + place
        following = torch.maximum(torch.where(nearest < 0, 1, block_size - late), 1 + (after >= 0))
    else:
        masks, following = accepted.new_zeros(len(accepted), block_size), 1 + (after >= 0)
    new = torch.cat((drafts[:, 1:], drafts[:, :1]), 1).scatter(1, accepted[:, None] - 1, next_token[:, None])
    result = torch.cat((torch.stack((accepted * active, drafted, known), 1), new), 1)
    return Decision(next_token, after, masks, following, result)


def decide(choice: Tensor, leaves: Leaves | None, judged: Judged, block_size: int) -> Decision:
    """`decide_eager` of `accept_greedy`, for choice [B, K + A]."""
    if available(choice.device):
        return decide_fused(choice, leaves, judged, block_size)
    return decide_eager(accept_greedy(choice, judged.drafts, judged.drafted, leaves), judged, block_size)


def decide_fused(choice: Tensor, leaves: Leaves | None, judged: Judged, block_size: int) -> Decision:
    """`decide` by the kernel."""
    drafts, drafted, known, anchors, active, slots, clean = judged
    batch, length = drafts.shape
    next_token, after, following = (torch.empty_like(drafted) for _ in range(3))
    masks = drafted.new_empty(batch, block_size)
    result = drafted.new_empty(batch, 3 + length)
    others = choice.shape[1] - length
    _judge[(batch,)](
        choice,
        drafts,
        drafted,
        known,
        anchors,
        active,
        leaves.tokens if leaves is not None else choice,
        leaves.parents if leaves is not None else choice,
        next_token,
        after,
        masks,
        following,
        result,
        drafts.stride(0),
        anchors.stride(0),
        slots,
        clean,
        LENGTH=length,
        LEAVES=others,
        BLOCKS=anchors.shape[1],
        BLOCK=block_size,
        KP=triton.next_power_of_2(max(length, block_size)),
        AP=triton.next_power_of_2(max(others, 1)),
        OP=triton.next_power_of_2(max(anchors.shape[1], 1)),
        num_warps=1,
        **options(choice.device),
    )
    return Decision(next_token, after, masks, following, result)


def choose_outcomes(confidence: Tensor, drafted: Tensor, count: int) -> Tensor:
    """[B, count] the likeliest outcomes, ascending in 1..K: `sampling.likely_outcomes`, on a GPU by a kernel."""
    if available(confidence.device):
        return choose_outcomes_fused(confidence, drafted, count)
    return likely_outcomes(confidence, drafted, count)


def choose_outcomes_fused(confidence: Tensor, drafted: Tensor, count: int) -> Tensor:
    """`choose_outcomes` by the kernel; of equally likely outcomes the earlier."""
    batch, others = confidence.shape
    outcomes = drafted.new_empty(batch, count)
    _choose[(batch,)](
        confidence,
        drafted,
        outcomes,
        confidence.stride(0),
        count,
        LENGTH=others + 1,
        KP=triton.next_power_of_2(others + 1),
        num_warps=1,
        **options(confidence.device),
    )
    return outcomes


if triton is not None:

    @triton.jit
    def _choose(
        confidence, drafted, outcomes, stride, count, LENGTH: tl.constexpr, KP: tl.constexpr, PDL: tl.constexpr
    ):
        b = tl.program_id(0)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        k = tl.arange(0, KP)
        row = confidence + b * stride
        judged = tl.load(drafted + b)
        # Outcome k + 1: drafts 2 .. k + 1 stand, the next one falls.
        stands = tl.load(row + k - 1, mask=(k > 0) & (k < tl.minimum(judged, LENGTH)), other=0.0)
        falls = 1.0 - tl.load(row + k, mask=(k + 1 < judged) & (k + 1 < LENGTH), other=0.0)
        chance = tl.cumprod(tl.where(k == 0, 1.0, stands), 0) * falls
        chance = tl.where(k < LENGTH, chance, -1.0)
        other = tl.reshape(chance, (1, KP))
        mine = tl.reshape(chance, (KP, 1))
        earlier = k[None, :] < k[:, None]
        rank = tl.sum(((other > mine) | ((other == mine) & earlier)).to(tl.int32), 1)
        chosen = rank < count
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        # Confidences that are no numbers would all be chosen.
        tl.store(outcomes + b * count + place, (k + 1).to(tl.int64), mask=chosen & (place < count))

    @triton.jit
    def _judge(
        choice,
        drafts,
        drafted,
        known,
        anchors,
        active,
        leaf_tokens,
        leaf_parents,
        next_token,
        after,
        masks,
        following,
        result,
        drafts_stride,
        anchors_stride,
        slots,
        clean,
        LENGTH: tl.constexpr,
        LEAVES: tl.constexpr,
        BLOCKS: tl.constexpr,
        BLOCK: tl.constexpr,
        KP: tl.constexpr,
        AP: tl.constexpr,
        OP: tl.constexpr,
        PDL: tl.constexpr,
    ):
        b = tl.program_id(0)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        k = tl.arange(0, KP)
        row = choice + b * (LENGTH + LEAVES)
        chosen = tl.load(row + k, mask=k < LENGTH - 1, other=0)
        draft = tl.load(drafts + b * drafts_stride + 1 + k, mask=k < LENGTH - 1, other=0)
        count = tl.load(drafted + b)
        stands = (chosen == draft) & (k + 1 < count) & (k < LENGTH - 1)
        accepted = 1 + tl.min(tl.where(stands, KP, k), 0)
        token = tl.load(row + accepted - 1)
        told = tl.full((), -1, tl.int64)
        if LEAVES:
            a = tl.arange(0, AP)
            leaf = tl.load(leaf_tokens + b * LEAVES + a, mask=a < LEAVES, other=-1)
            parent = tl.load(leaf_parents + a, mask=a < LEAVES, other=-1)
            say = tl.load(row + LENGTH + a, mask=a < LEAVES, other=-1)
            told = tl.max(tl.where((leaf == token) & (parent == accepted - 1), say, -1), 0)
        o = tl.arange(0, OP)
        anchor = tl.load(anchors + b * anchors_stride + o, mask=o < BLOCKS, other=LENGTH)
        before = tl.sum((anchor < accepted).to(tl.int32), 0)
        nearest = tl.max(tl.where(anchor < accepted, anchor, -1), 0)
        late = tl.where(before > 0, accepted - 1 - nearest, 0)
        place = tl.minimum(late + k, BLOCK - 1)
        start = b * slots + clean + tl.maximum(before - 1, 0) * BLOCK
        tl.store(masks + b * BLOCK + k, start + place, mask=k < BLOCK)
        drafts_left = tl.where(before > 0, BLOCK - late, 1)
        tl.store(following + b, tl.maximum(drafts_left, 1 + (told >= 0).to(tl.int64)))
        tl.store(next_token + b, token)
        tl.store(after + b, told)
        out = result + b * (3 + LENGTH)
        tl.store(out, tl.where(tl.load(active + b) != 0, accepted, 0))
        tl.store(out + 1, count)
        tl.store(out + 2, tl.load(known + b))
        last = tl.load(drafts + b * drafts_stride)
        new = tl.where(k == LENGTH - 1, last, draft)
        tl.store(out + 3 + k, tl.where(k == accepted - 1, token, new), mask=k < LENGTH)
