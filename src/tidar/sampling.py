"""Who decides which drafts stand: logits processing, verification, and reproducible randomness.

Everything here is a pure function of tensors. Whatever the drafter proposes, accepted tokens are distributed exactly as
the *processed* autoregressive distribution p (temperature, top-k, top-p, min-p); greedy decoding is its limit T = 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tidar.errors import TidarError

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: no draw would differ, but logits divided by them overflow float32."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        temperature: 0 (and anything below GREEDY_BELOW) is greedy.
        top_k, top_p, min_p: the usual truncations, None for off; ignored by greedy decoding, which they cannot change.
        seed: rows draw from streams keyed by (seed, row, position), so a batch equals its rows one by one.
        trust: beta of the paper's Sec. 3.3: tokens are judged by beta * AR logits + (1 - beta) * diffusion logits.
            1 is exact AR; anything lower trades exactness for the drafter's opinion.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    trust: float = 1.0

    def __post_init__(self) -> None:
        finite = math.isfinite(self.temperature)
        _require(finite and self.temperature >= 0, "temperature", self.temperature, "finite, 0 (greedy) or more")
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1")
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        _require(0 <= self.trust <= 1, "trust", self.trust, "in [0, 1]")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2^63)")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def unseeded(self) -> SamplingParams:
        """All but the seed, which is a row's and not its step's."""
        return replace(self, seed=0)

    def warpers(self) -> LogitsProcessorList:
        """transformers' own warpers, in the order `generate` applies them."""
        warpers = LogitsProcessorList()
        if self.temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers

    def probabilities(self, logits: Tensor) -> Tensor:
        """Processed distribution, float32, of logits [..., V]; all on the likeliest token for greedy decoding."""
        if self.greedy:
            return certain(logits)
        rows = logits.float().reshape(-1, logits.shape[-1])
        return self.warpers()(None, rows).softmax(-1).view(logits.shape)


def certain(logits: Tensor) -> Tensor:
    """The distribution of greedy decoding, float32, of logits [..., V]: all on the likeliest token."""
    return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1)


@dataclass(frozen=True)
class MixedParams:
    """Rows of one batch whose tokens are chosen in different ways; trust is 1. See `together`."""

    rows: tuple[SamplingParams, ...]
    greedy = False
    trust = 1.0

    @property
    def seed(self) -> Tensor:
        """[B] int64."""
        return torch.tensor([params.seed for params in self.rows])

    @property
    def unseeded(self) -> MixedParams:
        return MixedParams(tuple(params.unseeded for params in self.rows))

    def probabilities(self, logits: Tensor) -> Tensor:
        """As of `SamplingParams`, of logits [B, ..., V]: each row by its own."""
        result = torch.empty(logits.shape, device=logits.device)
        for params in set(self.rows):
            rows = torch.tensor([row for row, own in enumerate(self.rows) if own == params], device=logits.device)
            result[rows] = params.probabilities(logits[rows])
        return result


Sampling = SamplingParams | MixedParams


def together(rows: Sequence[SamplingParams]) -> Sampling:
    """How a batch of rows is sampled. Greedy rows among sampled ones get what greedy decoding gives them."""
    if all(params.greedy for params in rows):
        return SamplingParams()
    return rows[0] if len(set(rows)) == 1 else MixedParams(tuple(rows))


def _require(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise TidarError(f"{name} is {value}, but must be {wanted}")


class Verdict(NamedTuple):
    """What verification says, each [B] int64.

    accepted: j in 1..K, drafts that stand. next_token: the correction (j < K) or bonus (j = K). after: the verifier's
    token after that one, where next_token is on a leaf of the step, else -1.
    """

    accepted: Tensor
    next_token: Tensor
    after: Tensor


class Leaves(NamedTuple):
    """Alternatives to drafts, verified beside them: each is judged as if it were the token after its parent.

    tokens [B, A]; parents [A] int64, the draft (0..K-1) that each one continues; leaves of one parent are distinct.
    """

    tokens: Tensor
    parents: Tensor


class DraftProbs(NamedTuple):
    """Distributions q that drafts 2..K were drawn from, on the few tokens that have any weight.

    ids [B, K-1, C], distinct in each position; probs [B, K-1, C] float32.
    """

    ids: Tensor
    probs: Tensor


def accept_greedy(
    choice: Tensor, drafts: Tensor, drafted: Tensor | None = None, leaves: Leaves | None = None
) -> Verdict:
    """Greedy verification: a draft stands while it is the verifier's choice.

    Args:
        choice: [B, K + A] likeliest token after each draft and each leaf.
        drafts: [B, K]; drafts[:, 0] is already a token of the AR model.
        drafted: [B], how many of the drafts are any (1..K); default all.
        leaves: alternatives, for A > 0.
    """
    chain, others = choice.split((drafts.shape[1], choice.shape[1] - drafts.shape[1]), 1)
    accepted = _count_prefix(chain[:, :-1] == drafts[:, 1:], drafted)
    next_token = _at(chain, accepted - 1)
    if leaves is None:
        return Verdict(accepted, next_token, torch.full_like(accepted, -1))
    leaf = find_leaf(leaves, accepted, next_token)
    return Verdict(accepted, next_token, torch.where(leaf < 0, -1, _at(others, leaf.clamp(min=0))))


def find_leaf(leaves: Leaves, accepted: Tensor, next_token: Tensor) -> Tensor:
    """[B] the leaf that carries the next token after the drafts that stand, or -1.

    It does not matter how the leaves were chosen, nor whether the next token was sampled: the token is decided by then,
    and the leaf only tells what the verifier says after it. So leaves keep the output exact.
    """
    hits = (leaves.parents == accepted[:, None] - 1) & (leaves.tokens == next_token[:, None])
    return torch.where(hits.any(1), hits.long().argmax(1), -1)


def accept_sampled(
    probs: Tensor, drafts: Tensor, draft_probs: DraftProbs | None, noise: Tensor, drafted: Tensor | None = None
) -> Verdict:
    """Rejection sampling (Leviathan et al. 2023): the output is distributed exactly as `probs`.

    Draft d stands with probability min(1, p(d) / q(d)); the first rejected one is redrawn from max(0, p - q),
    renormalised; if all stand, the bonus is drawn from p.

    Args:
        probs: [B, K, V] processed AR distributions after each draft.
        drafts: [B, K]; drafts[:, 0] is already a token of the AR model.
        draft_probs: what drafts[:, 1:] were drawn from; None where they were not drawn but chosen (q is then a point
            mass on each). A draft of weight 0 stands wherever p allows it: it was drawn from p itself.
        noise: [B, K] uniform in [0, 1), independent of the drafts. The first draws the next token, so that a row with
            nothing to judge gets the same one whatever K is.
        drafted: [B], how many of the drafts are any (1..K); default all.
    """
    judged = drafts[:, 1:, None]
    q = DraftProbs(judged, torch.ones_like(judged, dtype=probs.dtype)) if draft_probs is None else draft_probs
    p_draft = probs[:, :-1].gather(-1, judged)[..., 0]
    q_draft = (q.probs * (q.ids == judged)).sum(-1)
    accepted = _count_prefix(noise[:, 1:] * q_draft < p_draft, drafted)
    p = _at(probs, accepted - 1)
    if drafts.shape[1] > 1:
        # Where no draft was judged, the token is a bonus: q is zero there and p - q is p itself.
        last = (accepted - 1).clamp(max=drafts.shape[1] - 2)
        rejected = accepted < (drafts.shape[1] if drafted is None else drafted)
        rest = p.scatter_add(-1, _at(q.ids, last), -_at(q.probs, last).to(p.dtype) * rejected[:, None]).clamp(min=0)
        p = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
    return Verdict(accepted, draw(p, noise[:, 0]), torch.full_like(accepted, -1))


def verify(
    params: Sampling,
    logits: Tensor,
    drafts: Tensor,
    draft_probs: DraftProbs | None,
    noise: Tensor | None,
    drafted: Tensor | None = None,
    leaves: Leaves | None = None,
) -> Verdict:
    """Judge drafts [B, K] by logits [B, K + A, V] as `params` asks; K = 1 simply picks the next token.

    noise is [B, K + 1] for sampling: one number more than the drafts need draws the token after a leaf.
    """
    if params.greedy:
        return accept_greedy(logits.argmax(-1), drafts, drafted, leaves)
    assert noise is not None
    length = drafts.shape[1]
    probs = params.probabilities(logits[:, :length])
    verdict = accept_sampled(probs, drafts, draft_probs, noise[:, :length], drafted)
    if leaves is None:
        return verdict
    leaf = find_leaf(leaves, verdict.accepted, verdict.next_token)
    after = draw(params.probabilities(_at(logits[:, length:], leaf.clamp(min=0))), noise[:, length])
    return verdict._replace(after=torch.where(leaf < 0, -1, after))


def outcome_probabilities(confidence: Tensor, drafted: Tensor) -> Tensor:
    """[B, K] probability of each outcome "j drafts accepted", j = 1..K, from the drafts' own confidences.

    P(j) = (prod_{i<=j} c_i) (1 - c_{j+1}), with c_1 = 1 (already decided) and c = 0 where nothing was drafted.

    Args:
        confidence: [B, K-1] the drafter's probability that drafts 2..K stand, each given the ones before it.
        drafted: [B], how many of the drafts are any (1..K).
    """
    index = torch.arange(2, confidence.shape[1] + 2, device=confidence.device)
    stands = confidence * (index <= drafted[:, None])
    one, zero = stands.new_ones(len(stands), 1), stands.new_zeros(len(stands), 1)
    reached = torch.cat((one, stands.cumprod(1)), 1)
    return reached * (1 - torch.cat((stands, zero), 1))


def likely_outcomes(confidence: Tensor, drafted: Tensor, count: int) -> Tensor:
    """[B, count] the likeliest outcomes, ascending in 1..K. See `outcome_probabilities`."""
    probabilities = outcome_probabilities(confidence, drafted)
    return 1 + probabilities.topk(count, 1).indices.sort(1).values


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw from unnormalised weights [..., V] by inverse CDF, uniform [...] in [0, 1); never a zero-weight index."""
    cdf = weights.double().cumsum(-1)
    goal = uniform.double()[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, goal, right=True)[..., 0].clamp(max=weights.shape[-1] - 1)


class Logprobs(NamedTuple):
    """Log-probabilities of tokens, natural, before temperature and truncation; float32.

    chosen [B, K]; ids, others [B, K, N]: the N likeliest tokens there and theirs, descending.
    """

    chosen: Tensor
    ids: Tensor
    others: Tensor


def log_probabilities(logits: Tensor, tokens: Tensor, count: int) -> Logprobs:
    """Of tokens [B, K] under logits [B, K, V], with the `count` likeliest beside each."""
    said = logits.float().log_softmax(-1)
    others, ids = said.topk(min(count, said.shape[-1]), -1)
    return Logprobs(said.gather(-1, tokens[..., None])[..., 0], ids, others)


def mix_trust(ar_logits: Tensor, diffusion_logits: Tensor, trust: float) -> Tensor:
    """beta * ar + (1 - beta) * diffusion (Sec. 3.3), both [B, K, V] for the same next positions."""
    return trust * ar_logits + (1 - trust) * diffusion_logits


def _count_prefix(stands: Tensor, drafted: Tensor | None) -> Tensor:
    """1 + the length of the leading run of True in [B, K-1], at most `drafted`."""
    accepted = 1 + stands.long().cumprod(1).sum(1)
    return accepted if drafted is None else torch.minimum(accepted, drafted)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values[b, index[b]] for values [B, K, ...]."""
    return values[torch.arange(len(values), device=values.device), index]


DEFAULT_DECODER = "max-confidence"


@dataclass(frozen=True)
class Reveal:
    """Which masks of a block become tokens in one forward of block diffusion (the decoders of the paper's Table 4).

    Attributes:
        count: how many are decided at least, as long as there are so many.
        threshold: tokens that the model gives a higher probability than this are decided as well.
        left_to_right: take the first masks, not those whose tokens have the highest probability.
    """

    count: int = 1
    threshold: float | None = None
    left_to_right: bool = False

    @staticmethod
    def parse(name: str) -> Reveal:
        """The decoder called "max-confidence", "left-to-right", "fixed-N" or "confidence>P". Raises TidarError."""
        if name == "max-confidence":
            return Reveal()
        if name == "left-to-right":
            return Reveal(left_to_right=True)
        if fixed := re.fullmatch(r"fixed-([1-9]\d{0,3})", name):
            return Reveal(count=int(fixed[1]))
        if confident := re.fullmatch(r"confidence>(0|0?\.\d+)", name):
            return Reveal(threshold=float(confident[1]))
        raise TidarError(
            f"decoder is {name!r}, but must be 'max-confidence', 'left-to-right', 'fixed-N' with N of at least 1, or "
            "'confidence>P' with P in [0, 1)"
        )


def choose_reveals(confidence: Tensor, candidates: Tensor, reveal: Reveal) -> Tensor:
    """[B, K] bool, the masks that become tokens now.

    Args:
        confidence: [B, K] probability of the token that each mask would become.
        candidates: [B, K] bool, the masks that are still to be decided.
        reveal: the decoder.
    """
    places = torch.arange(confidence.shape[1], device=confidence.device)
    score = torch.where(candidates, -places.float() if reveal.left_to_right else confidence, -torch.inf)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(1)
    chosen = rank < reveal.count
    if reveal.threshold is not None:
        chosen |= confidence > reveal.threshold
    return chosen & candidates


def undecided(block: Tensor, places: Tensor, start: Tensor, limit: Tensor, eos_ids: Tensor) -> Tensor:
    """[B, K] bool, the masks of a block that belong to the answer as far as it is known.

    Masks behind a decided end of sequence, or beyond the longest answer, stay masks: training never asked for those
    behind a document's end.

    Args:
        block: [B, K] token ids, negative for a mask.
        places: [B, K] where they stand in the text.
        start, limit: [B] where the answer begins, and where it must have ended.
        eos_ids: [E] tokens that end it.
    """
    ends = (block[..., None] == eos_ids).any(-1) & (places >= start[:, None])
    behind = ends.long().cumsum(1) - ends.long() > 0
    return (block < 0) & (places < limit[:, None]) & ~behind


_GAMMA, _MIX1, _MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _mix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 (wrapping multiplication, logical shifts)."""
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def row_seeds(seed: int | Tensor, rows: Tensor) -> Tensor:
    """[B] int64 stream keys of rows [B] (their index in the whole job, not in the batch), for one seed or one each."""
    return _mix64(_mix64(rows * _GAMMA + _GAMMA) + seed)


def uniforms(seeds: Tensor, positions: Tensor, count: int) -> Tensor:
    """[B, count] float64 in [0, 1), a pure function of (seeds [B], positions [B], index): same on every device."""
    base = _mix64(seeds + positions * _GAMMA)
    index = torch.arange(1, count + 1, device=seeds.device) * _GAMMA
    return _shift_right(_mix64(base[:, None] + index), 11).double() * 2.0**-53
