"""One forward of a TiDAR model: verify the drafts, draft what comes next, keep the cache exact (Sec. 3.3, Fig. 3).

`prefill` and `step` are the whole method. Plain autoregressive decoding is the same step with one draft (a token that
is already decided) and no outcome blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.decode.cache import RowCache
from tidar.layout import Layout, prefill_layout, step_layout
from tidar.model.network import Network
from tidar.model.propose import propose
from tidar.sampling import SamplingParams, mix_trust, row_seeds, uniforms, verify

Propose = Callable[[Network, Tensor, Tensor, SamplingParams, Tensor | None], tuple[Tensor, Tensor | None]]


class Plan:
    """What every step of a run does: draft length K, outcome blocks, and how tokens are chosen.

    K = 1 is autoregressive decoding. `propose` turns a block into drafts; tests replace it by oracles.
    """

    def __init__(
        self, draft_length: int, params: SamplingParams, device: torch.device, propose: Propose = propose
    ) -> None:
        self.draft_length, self.params, self.propose = draft_length, params, propose
        self.drafting = draft_length > 1
        self.layout: Layout = step_layout(draft_length, range(1, draft_length + 1) if self.drafting else (), device)


@dataclass
class State:
    """A running batch. drafts: [B, K], the first already a token of the output; draft_probs: [B, K-1, V] or None."""

    cache: RowCache
    drafts: Tensor
    draft_probs: Tensor | None
    seeds: Tensor

    @torch.inference_mode()
    def keep_rows(self, rows: Tensor) -> None:
        """Drop every row but `rows` [n]."""
        self.cache.keep_rows(rows)
        self.drafts, self.seeds = self.drafts[rows], self.seeds[rows]
        if self.draft_probs is not None:
            self.draft_probs = self.draft_probs[rows]

    @torch.inference_mode()
    def put_rows(self, rows: Tensor, other: State) -> None:
        """Put the rows of `other` in the places `rows` [n] of this batch."""
        self.cache.put_rows(rows, other.cache)
        self.drafts[rows], self.seeds[rows] = other.drafts, other.seeds
        if self.draft_probs is not None and other.draft_probs is not None:
            self.draft_probs[rows] = other.draft_probs


@torch.inference_mode()
def prefill(network: Network, prompts: list[list[int]], rows: list[int], plan: Plan) -> State:
    """Run the prompts (token ids, none empty) of job rows `rows`; the state's first drafts are the first new tokens."""
    device, width = network.device, max(map(len, prompts))
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
    layout = prefill_layout(lengths, width, plan.draft_length if plan.drafting else 0)
    cache = RowCache(len(prompts), device)
    cache.reserve(layout.size, 0)
    hidden = network(ids, layout, cache)
    cache.lengths = lengths
    last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
    block = hidden[:, layout.block(0)] if plan.drafting else None
    state = State(cache, ids[:, :1], None, row_seeds(plan.params.seed, torch.tensor(rows, device=device)))
    # A prefill is a step whose only "draft", the last prompt token, stands.
    _decide(network, state, plan, last[:, None], None if block is None else block[:, None], torch.zeros_like(lengths))
    return state


@torch.inference_mode()
def step(
    network: Network, state: State, plan: Plan, longest: int, active: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Judge the state's drafts and draft again, in one forward.

    `longest` is the largest of the cache's lengths (the caller knows it without asking the device); rows where `active`
    [B] is False do not move.

    Returns:
        accepted [B], how many drafts stood (1..K), and new tokens [B, K]: row b gained new[b, :accepted[b]], that is
        drafts 2..j and the verifier's own next token.
    """
    if active is not None:
        # A finished row may be longer than `longest`: it has no prefix any more, and writes at the front of its slots.
        state.cache.lengths = torch.where(active, state.cache.lengths, 0)
    cache, layout, drafts = state.cache, plan.layout.after(state.cache.lengths), state.drafts
    cache.reserve(layout.size, longest)
    hidden = network(drafts, layout, cache)
    clean, masks = hidden[:, : layout.clean], hidden[:, layout.clean :]
    blocks = masks.unflatten(1, (layout.blocks, layout.block_size)) if plan.drafting else None
    accepted = _decide(network, state, plan, clean, blocks, cache.lengths)
    new = torch.cat((drafts[:, 1:], drafts[:, :1]), 1).scatter(1, accepted[:, None] - 1, state.drafts[:, :1])
    if active is not None:
        accepted = torch.where(active, accepted, 0)
    cache.lengths = cache.lengths + accepted
    return accepted, new


def _decide(network: Network, state: State, plan: Plan, clean: Tensor, blocks: Tensor | None, key: Tensor) -> Tensor:
    """Verify, then draft from the block of the true outcome; `key` [B] names this step's random numbers.

    clean is [B, K, H], blocks [B, K, K, H] (outcome j at index j - 1). Sets the state's drafts, returns accepted [B].
    """
    params, judged = plan.params, clean.shape[1]
    noise = None if params.greedy else uniforms(state.seeds, key, judged + plan.draft_length - 1)
    logits = network.head(clean)
    if blocks is not None and params.trust < 1:
        logits = mix_trust(logits, network.head(blocks[:, :, 0]), params.trust)
    verify_noise, draft_noise = (None, None) if noise is None else (noise[:, :judged], noise[:, judged:])
    accepted, next_token = verify(params, logits, state.drafts[:, :judged], state.draft_probs, verify_noise)
    if blocks is None:
        state.drafts = next_token[:, None]
    else:
        rows = torch.arange(len(accepted), device=accepted.device)
        block = blocks[rows, accepted - 1]
        state.drafts, state.draft_probs = plan.propose(network, block, next_token, params, draft_noise)
    return accepted
