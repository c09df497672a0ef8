"""How much to draft: the plan with the most expected tokens per second, by measured costs and observed acceptance.

Drafting more gains tokens per forward and makes the forward dearer; where the free token slots end depends on the
machine, the model and the batch. Costs are measured (costs.py); what drafts are worth is learned from the run itself,
starting from a guess. Plain autoregressive decoding is one of the plans, so `auto` falls back to it where drafting does
not pay, and looks again now and then.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tidar.decode.costs import Costs
from tidar.decode.runner import Runner, power_of_two
from tidar.decode.step import Plan
from tidar.sampling import SamplingParams, outcome_probabilities

SHAPES = (
    *((1, 0), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 3), (4, 4), (6, 2), (6, 3), (6, 4), (6, 6)),
    *((8, 1), (8, 2), (8, 3), (8, 4), (8, 5), (8, 7), (8, 8), (12, 2), (12, 4), (12, 6), (16, 2), (16, 3), (16, 4)),
    *((16, 6), (16, 7), (16, 11), (16, 15)),
)
"""(draft length, outcomes) that `auto` chooses from; on a CPU every slot costs something, so small steps matter."""
SHAPES_CUDA = (*((1, 0), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 3), (8, 7), (8, 8), (16, 3), (16, 7), (16, 15)),)
"""On a GPU each is a graph to capture for every batch size. Slots land on tiles of matrix products: 16, 32, 64, 128."""
PRIOR, PRIOR_WEIGHT = 0.7, 8.0
"""Acceptance of a draft before anything was seen, and how many observations that guess is worth."""
MEMORY = 0.98
"""Share of past observations that is kept with each new forward's."""
THINK_AGAIN = 64
"""Most forwards between two choices; fewer while there is much to learn."""
MARGIN = 1.05
"""Another plan must promise this much more than the running one, drafting as much more than plain decoding: all figures
have errors, and a plan that is new to a batch size has its graph captured first."""
LOOK_AGAIN, LOOK_AGAIN_MOST = 64, 1024
"""Plain steps before the first look at whether drafting pays after all; twice as many after each look that says no."""
LOOK = 4
"""Forwards of such a look. The first judges nothing, as plain decoding left no drafts."""


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
    lengths = torch.tensor([length for length, _ in shapes])[:, None, None]
    counts = torch.tensor([outcomes for _, outcomes in shapes])[:, None, None]
    accepted = torch.arange(1, longest + 1)  # j; and d, row by row
    chances = torch.tensor(survival[: longest - 1], dtype=torch.float64).repeat(longest, 1)
    probabilities = outcome_probabilities(chances, accepted)  # [d, j]
    rank = probabilities.argsort(1, descending=True).argsort(1)
    chosen = torch.where(rank < counts, accepted, 0)  # [shape, d, j]: j where it is pre-drafted
    nearest = chosen.cummax(2).values
    following = torch.where(nearest == 0, 1, (lengths - accepted + nearest).clamp(min=1))
    moves = torch.zeros(following.shape, dtype=torch.float64)
    moves.scatter_add_(2, following - 1, probabilities.expand_as(moves))
    # numpy from here on: torch wakes a team of threads even for products this small, which may take milliseconds.
    each = np.linalg.matrix_power(moves.numpy(), 64)[:, 0]  # from d = 1
    share = (each + np.einsum("si,sij->sj", each, moves.numpy())) / 2  # both phases, should it swing between two
    return (share @ (probabilities * accepted).sum(1).numpy()).tolist()


class Acceptance:
    """Survival of drafts 2..K, from what was observed: a running mean that forgets, with a guess to start from."""

    def __init__(self, draft_length: int) -> None:
        self.tried = [PRIOR_WEIGHT] * (draft_length - 1)
        self.stood = [PRIOR_WEIGHT * PRIOR] * (draft_length - 1)

    def observe(self, accepted: Sequence[int], drafted: Sequence[int]) -> None:
        """A forward in which `accepted[b]` drafts stood of `drafted[b]`, both counting the first, which always does."""
        judged, standing = [0] * (len(self.tried) + 1), [0] * (len(self.tried) + 1)
        for stood, known in zip(accepted, drafted, strict=True):
            judged[min(stood, known - 1)] += 1
            standing[stood - 1] += 1
        tried = stood = 0
        for draft in reversed(range(len(self.tried))):
            tried, stood = tried + judged[draft + 1], stood + standing[draft + 1]
            if tried:
                self.tried[draft] = self.tried[draft] * MEMORY + tried
                self.stood[draft] = self.stood[draft] * MEMORY + stood

    @property
    def survival(self) -> list[float]:
        return [stood / tried for stood, tried in zip(self.stood, self.tried, strict=True)]


class AutoPlanner:
    """Chooses among the device's shapes before every forward.

    Args:
        params: how tokens are chosen.
        remeasure: measure the machine anew even if its costs are known.
    """

    def __init__(self, params: SamplingParams, remeasure: bool = False) -> None:
        self.params, self.remeasure = params, remeasure
        self.longest = Plan(max(length for length, _ in SHAPES), params)
        self.acceptance = Acceptance(self.longest.draft_length)
        self.costs: dict[int, list[tuple[Plan, float]]] = {}
        self._plan = self._running = Plan(1, params)  # what to do now, and what was chosen: they differ in a look
        self._size = self._left = self._age = 0  # batch size of the choice, forwards until the next, forwards so far
        self._patience = LOOK_AGAIN

    def prepare(self, runner: Runner, rows: int) -> None:
        measured = Costs(runner, self.remeasure)
        shapes = SHAPES_CUDA if runner.network.device.type == "cuda" else SHAPES
        plans = [Plan(length, self.params, blocks) for length, blocks in shapes]
        size = 1
        while size < 2 * rows:
            self.costs[size] = measured.of(plans, size)
            plain = next(seconds for plan, seconds in self.costs[size] if not plan.drafting)
            # A larger batch leaves fewer slots free: what cannot pay here cannot pay there.
            plans = [plan for plan, seconds in self.costs[size] if seconds <= plan.draft_length * plain]
            size *= 2
        self._size, self.remeasure = 0, False
        measured.save()

    def observe(self, accepted: Sequence[int], drafted: Sequence[int]) -> None:
        self.acceptance.observe(accepted, drafted)

    def choose(self, rows: int) -> Plan:
        size = power_of_two(rows)
        if size != self._size:
            self._size = size
            self._settle()
        elif not self._left:
            self._turn()
        self._left, self._age = self._left - 1, self._age + 1
        return self._plan

    def best(self, rows: int) -> Plan:
        """The plan with the most expected tokens per second for a batch of `rows`; the running one, if hardly worse."""
        rates = self._rates(rows)
        plain = next(plan for plan in rates if not plan.drafting)
        best, running = max(rates, key=lambda plan: rates[plan]), self._running
        if running.drafting and rates[plain] < rates.get(running, 0.0) >= rates[best] / MARGIN:
            return running
        return best if rates[best] > MARGIN * rates[plain] else plain

    def _rates(self, rows: int) -> dict[Plan, float]:
        """Expected tokens per second of every plan that can pay."""
        costs = self.costs[rows]
        gains = expected_tokens(self.acceptance.survival, [(plan.draft_length, plan.blocks) for plan, _ in costs])
        return {plan: gain / seconds for (plan, seconds), gain in zip(costs, gains, strict=True)}

    def _turn(self) -> None:
        """What comes when a plan has had its time: after plain decoding a look at drafting, else another choice."""
        looked = self._plan != self._running
        if not looked and not self._running.drafting:
            rates = {plan: rate for plan, rate in self._rates(self._size).items() if plan.drafting}
            if rates:
                self._plan, self._left = max(rates, key=lambda plan: rates[plan]), LOOK
                return
        if looked:
            self._patience = min(2 * self._patience, LOOK_AGAIN_MOST)
        self._settle()

    def _settle(self) -> None:
        """Choose a plan, and for how many forwards."""
        self._plan = self._running = self.best(self._size)
        if self._running.drafting:
            self._patience, self._left = LOOK_AGAIN, min(max(self._age, 4), THINK_AGAIN)
        else:
            self._left = self._patience
