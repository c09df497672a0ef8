"""One forward of a TiDAR model: verify the drafts, draft what comes next, keep the cache exact (Sec. 3.3, Fig. 3).

`prefill` and `step` are the whole method. Plain autoregressive decoding is the same step with one draft (a token that
is already decided) and no outcome blocks. A step changes its state in place and asks the device nothing, so the same
function runs eagerly and inside a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tidar.decode.cache import ROUND, RowCache
from tidar.kernels.draft import ALTERNATIVES
from tidar.kernels.judge import Decision, Judged, choose_outcomes, decide, decide_eager
from tidar.layout import Layout, prefill_layout, step_layout
from tidar.model.network import Network
from tidar.model.propose import CANDIDATES, Proposal, propose
from tidar.sampling import (
    DraftProbs,
    Leaves,
    Logprobs,
    Sampling,
    SamplingParams,
    log_probabilities,
    mix_trust,
    row_seeds,
    uniforms,
    verify,
)

Propose = Callable[[Network, Tensor, Tensor, Tensor, Tensor, Sampling, Tensor | None], Proposal]
"""See `model.propose.propose`; what it proposes must begin with the tokens that are known."""
REACH, RANKS = 0.7, (0.38, 0.14, 0.07)
"""How likely drafts stand, and the drafter's second, third and fourth choice where they fall: only to order leaves."""

GREEDY = SamplingParams()


@dataclass(frozen=True)
class Plan:
    """What a step does.

    Attributes:
        draft_length: K; 1 is autoregressive decoding.
        params: how tokens are chosen.
        outcomes: blocks that are drafted, the likeliest ones; None for all K.
        alternatives: leaves, that is drafts' next best tokens which are verified beside them. Where a draft falls and
            the right token is on a leaf, the verifier's token after it is known as well: one token more.
        propose: turns a block into drafts; tests replace it by oracles.
        logprobs: likeliest tokens whose log-probabilities are told beside each new token's; None tells nothing.
    """

    draft_length: int
    params: Sampling = GREEDY
    outcomes: int | None = None
    alternatives: int = 0
    propose: Propose = propose
    logprobs: int | None = None

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
    def leaves(self) -> tuple[tuple[int, int], ...]:
        """(draft that it continues, rank among the next draft's alternatives) of each leaf.

        None where trust is mixed: what the verifier says after a leaf would not be.
        """
        return choose_leaves(self.draft_length, self.alternatives if self.params.trust == 1 else 0)

    @property
    def slots(self) -> int:
        """Query tokens a row in one forward."""
        return self.draft_length * (1 + self.blocks) + len(self.leaves)

    @cached_property
    def key(self) -> Plan:
        """The plan without its seed, and its outcomes and leaves counted: what decides a captured step."""
        return replace(self, params=self.params.unseeded, outcomes=self.blocks, alternatives=len(self.leaves))


@cache
def choose_leaves(draft_length: int, count: int) -> tuple[tuple[int, int], ...]:
    """The `count` leaves that are likeliest to be hit: early drafts are judged more often, second choices hit more."""
    leaves = [(draft, rank) for draft in range(draft_length - 1) for rank in range(ALTERNATIVES)]
    leaves.sort(key=lambda leaf: -(REACH ** leaf[0]) * RANKS[leaf[1]])
    return tuple(sorted(leaves[:count], key=lambda leaf: (-leaf[0], leaf[1])))


@dataclass(frozen=True)
class StepResult:
    """What a step gave each row: one tensor [B, 3 + K], as one is copied to the host at once."""

    packed: Tensor

    @property
    def accepted(self) -> Tensor:
        """[B] how many drafts stood, 1..K; 0 in rows that are not active."""
        return self.packed[:, 0]

    @property
    def drafted(self) -> Tensor:
        """[B] how many there were to judge."""
        return self.packed[:, 1]

    @property
    def known(self) -> Tensor:
        """[B] how many of them, 1 or 2, the verifier had decided before."""
        return self.packed[:, 2]

    @property
    def new(self) -> Tensor:
        """[B, K] row b gained new[b, :accepted[b]]: drafts 2..j and the verifier's own next token."""
        return self.packed[:, 3:]


@dataclass
class State:
    """A running batch of B rows, with room for drafts of length K. All tensors stay where they are.

    Attributes:
        cache: the accepted prefixes.
        drafts: [B, K], the first already a token of the output.
        drafted: [B], how many of them are any; 1 right after plain decoding.
        known: [B], how many of them the verifier has decided: 2 after a hit on a leaf, else 1.
        confidence: [B, K-1] the drafter's probability of drafts 2..K.
        alternatives: [B, K-1, ALTERNATIVES] its next best tokens for them.
        draft_probs: what they were drawn from; None for greedy decoding.
        seeds: [B] random streams.
        active: [B] bool; rows that are not do not move.
        logprobs: of the tokens that the last forward gave, where its plan asks for them.
    """

    cache: RowCache
    drafts: Tensor
    drafted: Tensor
    known: Tensor
    confidence: Tensor
    alternatives: Tensor
    draft_probs: DraftProbs | None
    seeds: Tensor
    active: Tensor
    logprobs: Logprobs | None = None

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
            torch.ones(rows, dtype=torch.long, device=device),
            torch.zeros(rows, others, device=device),
            torch.zeros(rows, others, ALTERNATIVES, dtype=torch.long, device=device),
            probs,
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.zeros(rows, dtype=torch.bool, device=device),
        )

    def tensors(self) -> list[Tensor]:
        """Everything but the cache."""
        own = self.drafts, self.drafted, self.known, self.confidence, self.alternatives, self.seeds, self.active
        return [*own, *(self.draft_probs or ())]

    def first(self, rows: int, plan: Plan) -> State:
        """What a step of `plan` over the first `rows` rows works on, in the same memory.

        Greedy steps do without draft_probs, which are one operation more and mean nothing to them.
        """
        if plan.params.greedy and self.draft_probs is not None:
            return replace(self, draft_probs=None).first(rows, plan)
        if rows == len(self.drafts):
            return self
        drafts, drafted, known, confidence, alternatives, seeds, active, *probs = (t[:rows] for t in self.tensors())
        kept, cache = DraftProbs(*probs) if probs else None, self.cache.first(rows)
        return State(cache, drafts, drafted, known, confidence, alternatives, kept, seeds, active)

    @torch.inference_mode()
    def move_rows(self, rows: Tensor) -> None:
        """Bring the rows `rows` [n] to the front, in that order."""
        self.cache.move_rows(rows)
        for tensor in self.tensors():
            tensor[: len(rows)] = tensor[rows]

    @torch.inference_mode()
    def put_rows(self, rows: Tensor, other: State) -> None:
        """Put the rows of `other` in the places `rows` [n]. Greedy rows may join sampled ones."""
        self.cache.put_rows(rows, other.cache)
        # They bring no draft_probs, and whatever stands there does not change a greedy verdict.
        greedy_joins = other.draft_probs is None and self.draft_probs is not None
        for mine, new in zip(self.tensors(), other.tensors(), strict=not greedy_joins):
            (mine[:, : new.shape[1]] if new.dim() > 1 else mine)[rows] = new

    @torch.inference_mode()
    def copy_row(self, row: int, place: int, length: int) -> None:
        """Make row `place` a copy of row `row`, whose cache holds `length` tokens."""
        self.cache.copy_row(row, place, length)
        for tensor in self.tensors():
            tensor[place] = tensor[row]

    @torch.inference_mode()
    def drop_drafts(self, rows: Tensor) -> None:
        """Let the next step judge nothing in the rows `rows` [n] but the token that they have: plain decoding."""
        self.drafted[rows] = self.known[rows] = 1

    def leaves(self, plan: Plan) -> Leaves | None:
        """The leaves of a step of `plan`."""
        if not plan.leaves:
            return None
        parents, index = _leaf_constants(plan.leaves, self.drafts.device)
        return Leaves(self.alternatives.flatten(1)[:, index], parents)

    def keep_drafts(self, proposal: Proposal, decision: Decision, vocabulary: int) -> None:
        """Replace the drafts by a block's, which may be shorter than there is room for."""
        length = proposal.drafts.shape[1]
        self.drafts[:, :length] = proposal.drafts
        self.drafted.copy_(decision.drafted)
        torch.add(decision.after >= 0, 1, out=self.known)
        self.confidence[:, : length - 1] = proposal.confidence
        self.alternatives[:, : length - 1] = proposal.alternatives
        if self.draft_probs is not None:
            probs = proposal.probs or point_masses(proposal.drafts, self.draft_probs.ids.shape[2], vocabulary)
            for mine, new in zip(self.draft_probs, probs, strict=True):
                mine[:, : length - 1] = new
            # A known token was drawn from the verifier's own distribution: nobody may reject it.
            self.draft_probs.probs[:, 0] *= (decision.after < 0)[:, None]


class Seen(NamedTuple):
    """What a forward computed, before its drafts are replaced.

    plan, leaves: what it was. state: still with the drafts that were judged; cache.lengths [B] is the prefix.
    judged: how many drafts there is room for, 1 in a prefill. hidden: [B, judged + A + blocks * K, H] final states of
    drafts, leaves and outcome blocks. ar_logits, logits: [B, judged + A, V] of the AR half, and those that judged (with
    trust below 1 another mixture). decision: what follows.
    """

    plan: Plan
    leaves: Leaves | None
    state: State
    judged: int
    hidden: Tensor
    ar_logits: Tensor
    logits: Tensor
    decision: Decision


Observer = Callable[[Layout, Seen], None]
"""Is shown every forward of an eager runner, and must change nothing."""


@cache
def _leaf_constants(leaves: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Each leaf's parent, and its place among all alternatives of a row."""
    with torch.inference_mode(False):
        drafts, ranks = torch.tensor(leaves, dtype=torch.long).T.to(device)
        return drafts.contiguous(), drafts * ALTERNATIVES + ranks


def point_masses(drafts: Tensor, count: int, vocabulary: int) -> DraftProbs:
    """Drafts [B, K] that were chosen, not drawn, as distributions over `count` tokens each."""
    ids = (drafts[:, 1:, None] + torch.arange(count, device=drafts.device)) % vocabulary
    probs = torch.zeros(ids.shape, device=drafts.device)
    probs[..., 0] = 1
    return DraftProbs(ids, probs)


@torch.inference_mode()
def prefill(
    network: Network, prompts: list[list[int]], rows: list[int], plan: Plan, observer: Observer | None = None
) -> State:
    """Run the prompts (token ids, none empty) of job rows `rows`; the state's first drafts are the first new tokens."""
    width = max(map(len, prompts))
    if network.device.type == "cuda":
        width = -(-width // ROUND) * ROUND  # libraries plan anew for every shape
    packed = pack_prompts(prompts, rows, plan.params.seed, width).to(network.device)
    return prefill_rows(network, packed, plan, observer)


def pack_prompts(prompts: list[list[int]], rows: list[int], seed: int | Tensor, width: int) -> Tensor:
    """[B, width + 2] on the host: each prompt's ids, zeros, its length, and the seed of its row's random stream."""
    ids = torch.tensor([p + [0] * (width - len(p)) + [len(p)] for p in prompts])
    return torch.cat((ids, row_seeds(seed, torch.tensor(rows))[:, None]), 1)


@torch.inference_mode()
def prefill_rows(network: Network, packed: Tensor, plan: Plan, observer: Observer | None = None) -> State:
    """`prefill` of prompts that are on the device, see `pack_prompts`. Like a step, it asks the device nothing."""
    ids, lengths, seeds = packed[:, :-2], packed[:, -2], packed[:, -1]
    batch, width = ids.shape
    layout = prefill_layout(lengths, width, plan.draft_length if plan.drafting else 0, network.causal_blocks)
    state = State.empty(batch, layout.size, plan.draft_length, network, not plan.params.greedy)
    state.seeds.copy_(seeds)
    state.active.fill_(True)
    state.cache.reserve(layout.size)
    # cuDNN's attention takes a tenth of a second to plan for a shape it has not seen.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        hidden = network(ids, layout, state.cache, fused=True)
    last = hidden[torch.arange(batch, device=ids.device), lengths - 1]
    # A prefill is a step whose only "draft", the last prompt token, stands.
    state.drafts[:, 0] = ids.gather(1, lengths[:, None] - 1)[:, 0]
    anchors = torch.zeros_like(layout.anchors)
    hidden = torch.cat((last[:, None], hidden[:, width:]), 1)
    _decide(network, state, plan, hidden, 1, anchors, None, partial(observer, layout) if observer else None)
    state.cache.lengths.copy_(lengths)
    return state


@torch.inference_mode()
def step(
    network: Network, state: State, plan: Plan, longest: int | None = None, observer: Observer | None = None
) -> StepResult:
    """Judge the state's drafts and draft again, in one forward.

    `longest` is the largest of the cache's lengths, where the caller knows it (see `RowCache.reserve`). An observer is
    for forwards that are not captured.
    """
    cache, length = state.cache, plan.draft_length
    # A row that ended may be longer than `longest`: it has no prefix any more, and writes at the front of its slots.
    cache.lengths.mul_(state.active)
    outcomes, leaves = _outcomes(state, plan), state.leaves(plan)
    tokens = state.drafts[:, :length]
    if leaves is not None:
        tokens = torch.cat((tokens, leaves.tokens), 1)
    parents = tuple(draft for draft, _ in plan.leaves)
    layout = step_layout(length, outcomes, state.drafts.device, parents, network.causal_blocks)
    layout = layout.after(cache.lengths)
    cache.reserve(layout.size, longest)
    hidden = network(tokens, layout, cache, fused=True)
    show = partial(observer, layout) if observer else None
    result = _decide(network, state, plan, hidden, length, layout.anchors, leaves, show)
    cache.lengths.add_(result.accepted)
    return result


def _outcomes(state: State, plan: Plan) -> Tensor | range:
    """The outcomes that this step drafts for: [B, blocks], or all of them."""
    if plan.blocks in (0, plan.draft_length):
        return range(1, plan.blocks + 1)
    drafted = state.drafted.clamp(max=plan.draft_length)
    return choose_outcomes(state.confidence[:, : plan.draft_length - 1], drafted, plan.blocks)


def _decide(
    network: Network,
    state: State,
    plan: Plan,
    hidden: Tensor,
    judged: int,
    anchors: Tensor,
    leaves: Leaves | None,
    show: Callable[[Seen], None] | None,
) -> StepResult:
    """Verify, then draft from the block of the true outcome; sets the state's drafts.

    Args:
        hidden: [B, N, H] final hidden states: of the judged drafts, the leaves and the outcome blocks.
        judged: how many drafts; K, or 1 for a prefill.
        anchors: [B, blocks] the judged draft (0..judged-1) that each block continues, ascending.
        leaves: the step's leaves.
        show: is given what was computed.
    """
    params, length = plan.params, plan.draft_length
    batch, slots = hidden.shape[:2]
    clean = slots - anchors.shape[1] * length
    noise = None if params.greedy else uniforms(state.seeds, state.cache.lengths, judged + length)
    # One pass over the vocabulary's weights for all, where reading them is what it costs.
    most = 288 if hidden.is_cuda else 32 if hidden.dtype == torch.bfloat16 else 0
    everything = plan.drafting and batch * slots <= most
    all_logits = network.head(hidden if everything else hidden[:, :clean])
    logits = ar_logits = all_logits[:, :clean]
    if plan.drafting and params.trust < 1:
        first = all_logits[:, clean::length] if everything else network.head(hidden[:, clean::length])
        logits = torch.cat((mix_trust(logits[:, :judged], first, params.trust), logits[:, judged:]), 1)
    drafts, drafted = state.drafts[:, :judged], state.drafted.clamp(max=judged)
    facts = Judged(drafts, drafted, state.known, anchors, state.active, slots, clean)
    if params.greedy:
        decision = decide(logits.argmax(-1), leaves, facts, length)
    else:
        assert noise is not None
        probs = state.draft_probs
        if probs is not None:
            probs = DraftProbs(*(tensor[:, : judged - 1] for tensor in probs))
        verdict = verify(params, logits, drafts, probs, noise[:, : judged + 1], drafted, leaves)
        decision = decide_eager(verdict, facts, length)
    if plan.logprobs is not None:
        new = decision.result[:, 3 : 3 + judged]
        state.logprobs = log_probabilities(ar_logits[:, :judged], new, plan.logprobs)
    if show is not None:
        show(Seen(plan, leaves, state, judged, hidden, ar_logits, logits, decision))
    if not plan.drafting:
        state.drafts[:, 0] = decision.next_token
        state.drafted.fill_(1)
        state.known.fill_(1)
        return StepResult(decision.result)
    block = hidden.flatten(0, 1)[decision.masks]
    block_logits = all_logits.flatten(0, 1)[decision.masks[:, 1:]] if everything else network.head(block[:, 1:])
    draft_noise = None if noise is None else noise[:, judged + 1 :]
    proposal = plan.propose(network, block, block_logits, decision.next_token, decision.after, params, draft_noise)
    state.keep_drafts(proposal, decision, network.vocabulary)
    return StepResult(decision.result)
