"""How much to draft: the plan with the most expected tokens per second, by measured costs and observed acceptance.

Drafting more gains tokens per forward and makes the forward dearer; where the free token slots end depends on the
machine, the model and the batch. Costs are measured (costs.py); what drafts are worth is learned from the run itself,
starting from a guess. Plain autoregressive decoding is one of the plans, so `auto` falls back to it where drafting does
not pay, and looks again now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tidar.decode.costs import Costs
from tidar.decode.step import Plan
from tidar.model.network import Network
from tidar.sampling import SamplingParams, likely_outcomes, outcome_probabilities

SHAPES = (
    *((1, 0), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 3), (4, 4), (6, 2), (6, 3), (6, 4), (6, 6)),
    *((8, 1), (8, 2), (8, 3), (8, 4), (8, 5), (8, 7), (8, 8), (12, 2), (12, 4), (12, 6), (16, 2), (16, 3), (16, 4)),
    *((16, 6), (16, 7), (16, 11), (16, 15)),
)
"""(draft length, outcomes) that `auto` chooses from; slots land on tiles of matrix products: 64, 72, 112, 128, 256."""
PRIOR, PRIOR_WEIGHT = 0.7, 8.0
"""Acceptance of a draft before anything was seen, and how many observations that guess is worth."""
MEMORY = 0.98
"""Share of past observations that is kept for each new one."""
THINK_AGAIN = 64
"""Most forwards between two choices, each of which takes a few milliseconds; fewer while there is much to learn."""
MARGIN = 1.03
"""Drafting must promise this much more than plain decoding: both figures have errors."""
LOOK_AGAIN = 64
"""Plain steps between two looks at whether drafting pays after all."""
LOOK = 4
"""Forwards of such a look."""


def expected_tokens(survival: Sequence[float], shapes: Sequence[tuple[int, int]]) -> list[float]:
    """Tokens a forward in the long run, for each (draft length K, outcomes).

    With d drafts to judge, outcome j has probability P_d(j) (see `sampling.outcome_probabilities`), and the next d is K
    less the distance to the nearest pre-drafted outcome at or before j, or 1 if there is none. This is a Markov chain
    over d; the result is the mean of j under its stationary distribution. All shapes are computed together: the engine
    asks between two forwards that may take half a millisecond.

    Args:
        survival: probability that draft 2, 3, ... stands, given the ones before it; one fewer than the largest K.
        shapes: K and how many of the likeliest outcomes are drafted for.
    """
    longest = max(length for length, _ in shapes)
    lengths = torch.tensor([length for length, _ in shapes])
    accepted = torch.arange(1, longest + 1)  # j; and d, row by row
    drafted = torch.minimum(accepted, lengths[:, None])
    chances = torch.tensor(survival[: longest - 1], dtype=torch.float64).repeat(longest, 1)
    probabilities = torch.stack([outcome_probabilities(chances, d) for d in drafted])  # [shape, d, j]
    moves = torch.zeros_like(probabilities)
    for index, (length, outcomes) in enumerate(shapes):
        if length == 1:
            moves[index, :, 0] = 1
            continue
        chosen = likely_outcomes(chances, drafted[index], min(outcomes, length))
        nearest = (chosen[:, None] <= accepted[:, None]).sum(-1) - 1
        late = accepted - chosen.gather(1, nearest.clamp(min=0))
        following = torch.where(nearest < 0, 1, length - late).clamp(min=1)
        moves[index].scatter_add_(1, following - 1, probabilities[index])
    settled = moves
    for _ in range(6):  # 64 moves from d = 1
        settled = settled @ settled
    share = (settled[:, :1] + settled[:, :1] @ moves) / 2  # both phases, should it swing between two
    return (share[:, 0] * (probabilities @ accepted.double())).sum(-1).tolist()


class Acceptance:
    """Survival of drafts 2..K, from what was observed: a running mean that forgets, with a guess to start from."""

    def __init__(self, draft_length: int) -> None:
        self.tried = [PRIOR_WEIGHT] * (draft_length - 1)
        self.stood = [PRIOR_WEIGHT * PRIOR] * (draft_length - 1)

    def observe(self, accepted: int, drafted: int) -> None:
        """`accepted` drafts stood of `drafted`, both counting the first, which always does."""
        for draft in range(min(accepted, drafted - 1)):
            self.tried[draft] = self.tried[draft] * MEMORY + 1
            self.stood[draft] = self.stood[draft] * MEMORY + (draft + 1 < accepted)

    @property
    def survival(self) -> list[float]:
        return [stood / tried for stood, tried in zip(self.stood, self.tried, strict=True)]


class AutoPlanner:
    """Chooses among SHAPES before every forward.

    Args:
        params: how tokens are chosen.
        remeasure: measure the machine anew even if its costs are known.
    """

    def __init__(self, params: SamplingParams, remeasure: bool = False) -> None:
        self.plans = [Plan(length, params, blocks) for length, blocks in SHAPES]
        self.longest = replace(max(self.plans, key=lambda plan: plan.draft_length), outcomes=None)
        self.acceptance = Acceptance(self.longest.draft_length)
        self.remeasure = remeasure
        self.costs: dict[int, list[tuple[Plan, float]]] = {}
        self._chosen: dict[int, Plan] = {}
        self._age = self._plain = self._think = 0

    def prepare(self, network: Network, rows: int) -> None:
        measured = Costs(network, self.remeasure)
        size = 1
        while size < 2 * rows:
            self.costs[size] = measured.of(self.plans, size)
            size *= 2
        self.remeasure = False
        measured.save()

    def observe(self, accepted: int, drafted: int) -> None:
        self.acceptance.observe(accepted, drafted)

    def choose(self, rows: int) -> Plan:
        size = 1 << max(0, rows - 1).bit_length()
        if size not in self._chosen or self._age >= self._think:
            self._chosen = {size: self.best(size)}
            self._think = self._age + min(max(self._age, 4), THINK_AGAIN)
        self._age += 1
        plan = self._chosen[size]
        if plan.drafting:
            self._plain = 0
            return plan
        self._plain += 1
        looking = self._plain % (LOOK_AGAIN + LOOK) >= LOOK_AGAIN
        return self.best(size, drafting=True) if looking else plan

    def best(self, rows: int, drafting: bool = False) -> Plan:
        """The plan with the most expected tokens per second for a batch of `rows`; `drafting` leaves out the plain."""
        costs = self.costs[rows]
        gains = expected_tokens(self.acceptance.survival, [(plan.draft_length, plan.blocks) for plan, _ in costs])
        rates = {plan: gain / seconds for (plan, seconds), gain in zip(costs, gains, strict=True)}
        plain = next(plan for plan in rates if not plan.drafting)
        drafts = [plan for plan in rates if plan.drafting]
        if not drafts:
            return plain
        best = max(drafts, key=lambda plan: rates[plan])
        return best if drafting or rates[best] > MARGIN * rates[plain] else plain
