"""One forward of a TiDAR model: verify the drafts, draft what comes next, keep the cache exact (Sec. 3.3, Fig. 3).

`prefill` and `step` are the whole method. Plain autoregressive decoding is the same step with one draft (a token that
is already decided) and no outcome blocks. A step changes its state in place and asks the device nothing, so the same
function runs eagerly and inside a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tidar.decode.cache import ROUND, RowCache
from tidar.layout import prefill_layout, step_layout
from tidar.model.network import Network
from tidar.model.propose import CANDIDATES, Proposal, propose
from tidar.sampling import DraftProbs, SamplingParams, likely_outcomes, mix_trust, row_seeds, uniforms, verify

Propose = Callable[[Network, Tensor, Tensor, Tensor, SamplingParams, Tensor | None], Proposal]


GREEDY = SamplingParams()


@dataclass(frozen=True)
class Plan:
    """What a step does.

    Attributes:
        draft_length: K; 1 is autoregressive decoding.
        params: how tokens are chosen.
        outcomes: blocks that are drafted, the likeliest ones; None for all K.
        propose: turns a block into drafts; tests replace it by oracles.
    """

    draft_length: int
    params: SamplingParams = GREEDY
    outcomes: int | None = None
    propose: Propose = propose

    @property
    def drafting(self) -> bool:
        return self.draft_length > 1

    @property
    def blocks(self) -> int:
        """Outcome blocks of a step. Mixing trust judges every draft by a block of its own, so it needs all."""
        if not self.drafting:
            return 0
        if self.outcomes is None or self.params.trust < 1:
            return self.draft_length
        return min(self.outcomes, self.draft_length)

    @property
    def slots(self) -> int:
        """Query tokens a row in one forward."""
        return self.draft_length * (1 + self.blocks)

    @property
    def key(self) -> Plan:
        """The plan without its seed, and its outcomes counted: what decides a captured step."""
        return replace(self, params=replace(self.params, seed=0), outcomes=self.blocks)


class StepResult(NamedTuple):
    """What a step gave each row.

    accepted [B]: how many drafts stood, 1..K; 0 in rows that are not active. drafted [B]: how many there were to judge.
    new [B, K]: row b gained new[b, :accepted[b]], that is drafts 2..j and the verifier's own next token.
    """

    accepted: Tensor
    drafted: Tensor
    new: Tensor


@dataclass
class State:
    """A running batch of B rows, with room for drafts of length K. All tensors stay where they are.

    Attributes:
        cache: the accepted prefixes.
        drafts: [B, K], the first already a token of the output.
        drafted: [B], how many of them are any; 1 right after plain decoding.
        confidence: [B, K-1] the drafter's probability of drafts 2..K.
        draft_probs: what they were drawn from; None for greedy decoding.
        seeds: [B] random streams.
        active: [B] bool; rows that are not do not move.
    """

    cache: RowCache
    drafts: Tensor
    drafted: Tensor
    confidence: Tensor
    draft_probs: DraftProbs | None
    seeds: Tensor
    active: Tensor

    @staticmethod
    def empty(rows: int, capacity: int, draft_length: int, network: Network, sampled: bool) -> State:
        """No row active; `capacity` tokens of cache a row."""
        device, others = network.device, draft_length - 1
        count = min(CANDIDATES, network.vocabulary)
        probs = None
        if sampled:
            ids = torch.arange(count, device=device).repeat(rows, others, 1)
            probs = DraftProbs(ids, torch.zeros(rows, others, count, device=device))
        return State(
            RowCache(rows, capacity, device),
            torch.zeros(rows, draft_length, dtype=torch.long, device=device),
            torch.ones(rows, dtype=torch.long, device=device),
            torch.zeros(rows, others, device=device),
            probs,
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.zeros(rows, dtype=torch.bool, device=device),
        )

    def tensors(self) -> list[Tensor]:
        """Everything but the cache."""
        return [self.drafts, self.drafted, self.confidence, self.seeds, self.active, *(self.draft_probs or ())]

    def first(self, rows: int) -> State:
        """The first `rows` rows, in the same memory."""
        if rows == len(self.drafts):
            return self
        drafts, drafted, confidence, seeds, active, *probs = (tensor[:rows] for tensor in self.tensors())
        kept = DraftProbs(*probs) if probs else None
        return State(self.cache.first(rows), drafts, drafted, confidence, kept, seeds, active)

    @torch.inference_mode()
    def move_rows(self, rows: Tensor) -> None:
        """Bring the rows `rows` [n] to the front, in that order."""
        self.cache.move_rows(rows)
        for tensor in self.tensors():
            tensor[: len(rows)] = tensor[rows]

    @torch.inference_mode()
    def put_rows(self, rows: Tensor, other: State) -> None:
        """Put the rows of `other` in the places `rows` [n]."""
        self.cache.put_rows(rows, other.cache)
        for mine, new in zip(self.tensors(), other.tensors(), strict=True):
            (mine[:, : new.shape[1]] if new.dim() > 1 else mine)[rows] = new

    def keep_drafts(self, proposal: Proposal, drafted: Tensor, vocabulary: int) -> None:
        """Replace the drafts by a block's, which may be shorter than there is room for."""
        length = proposal.drafts.shape[1]
        self.drafts[:, :length] = proposal.drafts
        self.drafted.copy_(drafted)
        self.confidence[:, : length - 1] = proposal.confidence
        if self.draft_probs is not None:
            probs = proposal.probs or point_masses(proposal.drafts, self.draft_probs.ids.shape[2], vocabulary)
            for mine, new in zip(self.draft_probs, probs, strict=True):
                mine[:, : length - 1] = new


def point_masses(drafts: Tensor, count: int, vocabulary: int) -> DraftProbs:
    """Drafts [B, K] that were chosen, not drawn, as distributions over `count` tokens each."""
    ids = (drafts[:, 1:, None] + torch.arange(count, device=drafts.device)) % vocabulary
    probs = torch.zeros(ids.shape, device=drafts.device)
    probs[..., 0] = 1
    return DraftProbs(ids, probs)


@torch.inference_mode()
def prefill(network: Network, prompts: list[list[int]], rows: list[int], plan: Plan) -> State:
    """Run the prompts (token ids, none empty) of job rows `rows`; the state's first drafts are the first new tokens."""
    width = max(map(len, prompts))
    if network.device.type == "cuda":
        width = -(-width // ROUND) * ROUND  # libraries plan anew for every shape
    return prefill_rows(network, pack_prompts(prompts, rows, plan.params.seed, width).to(network.device), plan)


def pack_prompts(prompts: list[list[int]], rows: list[int], seed: int, width: int) -> Tensor:
    """[B, width + 2] on the host: each prompt's ids, zeros, its length, and the seed of its row's random stream."""
    ids = torch.tensor([p + [0] * (width - len(p)) + [len(p)] for p in prompts])
    return torch.cat((ids, row_seeds(seed, torch.tensor(rows))[:, None]), 1)


@torch.inference_mode()
def prefill_rows(network: Network, packed: Tensor, plan: Plan) -> State:
    """`prefill` of prompts that are on the device, see `pack_prompts`. Like a step, it asks the device nothing."""
    ids, lengths, seeds = packed[:, :-2], packed[:, -2], packed[:, -1]
    batch, width = ids.shape
    layout = prefill_layout(lengths, width, plan.draft_length if plan.drafting else 0)
    state = State.empty(batch, layout.size, plan.draft_length, network, not plan.params.greedy)
    state.seeds.copy_(seeds)
    state.active.fill_(True)
    state.cache.reserve(layout.size)
    # cuDNN's attention takes a tenth of a second to plan for a shape it has not seen.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        hidden = network(ids, layout, state.cache, fused=True)
    last = hidden[torch.arange(batch, device=ids.device), lengths - 1]
    masks = hidden[:, layout.block(0)] if plan.drafting else hidden[:, :0]
    # A prefill is a step whose only "draft", the last prompt token, stands.
    state.drafts[:, 0] = ids.gather(1, lengths[:, None] - 1)[:, 0]
    outcomes = torch.ones(batch, 1, dtype=torch.long, device=ids.device)
    _decide(network, state, plan, last[:, None], masks, outcomes)
    state.cache.lengths.copy_(lengths)
    return state


@torch.inference_mode()
def step(network: Network, state: State, plan: Plan, longest: int | None = None) -> StepResult:
    """Judge the state's drafts and draft again, in one forward.

    `longest` is the largest of the cache's lengths, where the caller knows it (see `RowCache.reserve`).
    """
    cache, length = state.cache, plan.draft_length
    # A row that ended may be longer than `longest`: it has no prefix any more, and writes at the front of its slots.
    cache.lengths.mul_(state.active)
    drafts, outcomes = state.drafts[:, :length].clone(), _outcomes(state, plan)
    drafted = state.drafted.clamp(max=length)
    layout = step_layout(length, outcomes).after(cache.lengths)
    cache.reserve(layout.size, longest)
    hidden = network(drafts, layout, cache, fused=True)
    accepted, next_token = _decide(network, state, plan, hidden[:, :length], hidden[:, length:], outcomes)
    new = torch.cat((drafts[:, 1:], drafts[:, :1]), 1).scatter(1, accepted[:, None] - 1, next_token[:, None])
    accepted = accepted * state.active
    cache.lengths.add_(accepted)
    return StepResult(accepted, drafted, new)


def _outcomes(state: State, plan: Plan) -> Tensor:
    """[B or 1, blocks] the outcomes that this step drafts for."""
    if plan.blocks in (0, plan.draft_length):
        return torch.arange(1, plan.blocks + 1, device=state.drafts.device)[None]
    drafted = state.drafted.clamp(max=plan.draft_length)
    return likely_outcomes(state.confidence[:, : plan.draft_length - 1], drafted, plan.blocks)


def _decide(
    network: Network, state: State, plan: Plan, clean: Tensor, masks: Tensor, outcomes: Tensor
) -> tuple[Tensor, Tensor]:
    """Verify, then draft from the block of the true outcome; sets the state's drafts.

    Args:
        clean: [B, n, H] final hidden states of the drafts; n = K, or 1 for a prefill.
        masks: [B, blocks * K, H] those of the outcome blocks.
        outcomes: [B or 1, blocks] what each block stands for, ascending.

    Returns:
        accepted [B] and the verifier's next token [B].
    """
    params, judged, length = plan.params, clean.shape[1], plan.draft_length
    noise = None if params.greedy else uniforms(state.seeds, state.cache.lengths, judged + length - 1)
    verify_noise, draft_noise = (None, None) if noise is None else (noise[:, :judged], noise[:, judged:])
    probs = state.draft_probs
    if probs is not None:
        probs = DraftProbs(*(tensor[:, : judged - 1] for tensor in probs))
    drafted = state.drafted.clamp(max=judged)
    blocks = masks.unflatten(1, (-1, length))
    # One pass over the vocabulary's weights for all, where reading them is what it costs.
    most = 288 if clean.is_cuda else 32 if clean.dtype == torch.bfloat16 else 0
    everything = plan.drafting and len(clean) * (judged + blocks.shape[1] * (length - 1)) <= most
    if everything:
        logits, block_logits = network.head(torch.cat((clean, blocks[:, :, 1:].flatten(1, 2)), 1)).split(
            (judged, blocks.shape[1] * (length - 1)), 1
        )
    else:
        logits = network.head(clean)
    if plan.drafting and params.trust < 1:
        logits = mix_trust(logits, network.head(blocks[:, :, 0]), params.trust)
    accepted, next_token = verify(params, logits, state.drafts[:, :judged], probs, verify_noise, drafted)
    if not plan.drafting:
        state.drafts[:, 0] = next_token
        state.drafted.fill_(1)
        return accepted, next_token
    # The block of the true outcome; if it was pruned, what the nearest earlier outcome's says beyond the next token.
    rows = torch.arange(len(accepted), device=accepted.device)
    nearest = (outcomes <= accepted[:, None]).sum(1) - 1
    index = nearest.clamp(min=0)
    late = accepted - outcomes.expand(len(accepted), -1).gather(1, index[:, None])[:, 0]
    place = (late.clamp(min=0)[:, None] + torch.arange(length, device=late.device)).clamp(max=length - 1)
    block = blocks[rows[:, None], index[:, None], place]
    if everything:
        block_logits = block_logits.unflatten(1, (-1, length - 1))[rows[:, None], index[:, None], place[:, 1:] - 1]
    else:
        block_logits = network.head(block[:, 1:])
    proposal = plan.propose(network, block, block_logits, next_token, params, draft_noise)
    state.keep_drafts(proposal, torch.where(nearest < 0, 1, length - late), network.vocabulary)
    return accepted, next_token
