"""How much to draft: the plan with the most expected tokens per second, by measured costs and observed acceptance.

Drafting more gains tokens per forward and makes the forward dearer; where the free token slots end depends on the
machine, the model and the batch. Costs are measured (costs.py); what drafts are worth is learned from the run itself,
starting from a guess. Plain autoregressive decoding is one of the plans, so `auto` falls back to it where drafting does
not pay, and looks again now and then.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tidar.decode.costs import Costs
from tidar.decode.runner import Gain, Runner, power_of_two
from tidar.decode.step import RANKS, Plan, choose_leaves
from tidar.sampling import SamplingParams, outcome_probabilities

SHAPES = (
    *((1, 0, 0), (2, 1, 0), (2, 2, 2), (3, 1, 2), (3, 2, 2), (3, 3, 3), (4, 1, 3), (4, 2, 3), (4, 3, 4), (4, 4, 4)),
    *((6, 2, 3), (6, 2, 6), (6, 3, 4), (6, 4, 5), (8, 1, 0), (8, 1, 5), (8, 2, 3), (8, 2, 6), (8, 3, 4), (8, 3, 8)),
    *((8, 4, 4), (8, 5, 6), (8, 7, 7), (12, 2, 4), (12, 4, 6), (16, 2, 6), (16, 3, 6), (16, 4, 8), (16, 6, 10)),
)
"""(draft length, outcomes, alternatives) that `auto` chooses from. On a CPU every slot costs something, so small steps
matter; alternatives cost one slot each and outcomes a draft length each."""
SHAPES_CUDA = (
    *((1, 0, 0), (2, 2, 3), (4, 1, 8), (4, 2, 4), (4, 4, 9), (8, 1, 0), (8, 1, 12), (8, 3, 0), (8, 3, 16)),
    *((8, 7, 16), (8, 8, 8), (16, 3, 16), (16, 6, 16), (16, 15, 16)),
)
"""On a GPU each is a graph to capture for every batch size. Slots fill tiles of matrix products: 16, 32, 48, 64, 80."""
LONGEST = (16, 15, 16)
"""The one of all these that needs the most room."""
PRIOR, PRIOR_WEIGHT = 0.7, 8.0
"""Acceptance of a draft before anything was seen, and how many observations that guess is worth."""
MEMORY = 0.98
"""Share of past observations that is kept with each new forward's."""
THINK_AGAIN = 64
"""Most forwards between two choices; fewer while there is much to learn."""
MARGIN = 1.05
"""Another plan must promise this much more than the running one, drafting as much more than plain decoding: all figures
have errors, and a plan that is new to a batch size has its graph captured first."""
UNEVEN = 0.0625
"""What drafting must promise more for each doubling of the batch: rows end at different times then, so places stay
empty until others take them or the batch is halved, and prefills come one by one. Plainly decoded rows keep pace with
each other. On an H200 promises above 1.2 were worth 0.8 to 1.2 at batch 16 and 64, and about 1.2 at batch 4."""
LAST = 0.06
"""What it must promise beyond that for each doubling to begin once nothing waits for the places of rows that end: the
job then takes as long as its slowest row, which is the further from the mean the more rows there are. Of 24 answers to
GSM8K or MT-Bench the slowest took 1.3 to 1.4 times the forwards of their mean (results/compare-smollm2-135m-h200); what
is asked for has not been timed."""
HOLD = 0.5
"""Share of UNEVEN that it must promise to go on, whether prompts wait or not: its rows are out of step by then, and
stay so if it stops. On an H200 MT-Bench in batches of 16 decodes 1% slower than plainly if all of it drafts, and 5%
where runs began with drafts and gave them up (results/speed-smollm2-135m-batches-h200, hold-smollm2-135m-h200)."""
LOOK_AGAIN = 64
"""Fewest plain steps before a look at whether drafting pays after all.

A batch that decodes plainly and has shrunk, as half of its rows have ended, goes on so for as many steps: the rest may
end soon, and the first forward that drafts gains nothing but what plain decoding does."""
LOOK_SHARE = 0.01
"""Share of the time that looks may lose, by what is known: the dearer one is, the longer until it comes."""
MOST_DOUBTS = 3
"""Drafting that is found wanting is a doubt; drafting that goes on takes one away. Each but the first halves the share
that looks may lose, to a quarter at least. Rows near the end of their answers draft better than others, so that a look
there may promise what the next run does not keep: on an H200 MT-Bench in batches of 16 looked, hoped, drafted and gave
up in every other run."""
FIRST_LOOK, FIRST_LOOK_SHARE = 8, 0.05
"""Plain steps before the first look of all, and the share of the time that it may cost beside its own forwards: those
are worth it, while acceptance is a guess."""
STAGGER = 100.0
"""What a look costs a batch beside its own forwards, in plain ones, while prompts wait for its places: it leaves the
rows staggered, so that places stay empty and prefills come more often, and in sizes that are not captured, until the
run ends. On an H200 it came to 50 to 150 with 64 MT-Bench prompts in batches of 16."""
STAGGER_LAST = 10.0
"""The same once none waits: rows out of step end one by one. With 64 GSM8K prompts in one batch it came to 6."""
CAPTURE = 0.15
"""Seconds that capturing a step takes, as a guess between the two: of 135M parameters on an H200 0.03 to 0.05 where its
kernels are compiled, which Triton keeps on disk, else up to 3 (results/captures-smollm2-135m-h200)."""
MOST_LEARNED = 64
"""Sampling parameters whose acceptance is kept; a server may be asked for any number of temperatures."""
LOOK = 4
"""Forwards of such a look. The first judges nothing, as plain decoding left no drafts."""


def expected_tokens(
    survival: Sequence[float], shapes: Sequence[tuple[int, int, int]], hits: Sequence[float] = RANKS
) -> list[float]:
    """Tokens a forward in the long run, for each shape (draft length K, outcomes, alternatives).

    With d drafts to judge, outcome j has probability P_d(j) (see `sampling.outcome_probabilities`), and the next d is K
    less the distance to the nearest pre-drafted outcome at or before j, or 1 if there is none. If the draft that fell
    has leaves, one of them is hit with probability `hits`, and then the second of the next drafts stands for certain.
    This is a Markov chain over d and whether that is so; the result is the mean of j under its stationary distribution.
    All shapes are computed together: the engine asks between two forwards that may take half a millisecond.

    Args:
        survival: probability that draft 2, 3, ... stands, given the ones before it; one fewer than the largest K.
        shapes: K, how many of the likeliest outcomes are drafted for, and how many leaves there are.
        hits: probability that the right token is the drafter's second, third, ... choice, where the first fell.
    """
    longest = max(length for length, *_ in shapes)
    lengths, counts = (torch.tensor([shape[i] for shape in shapes])[:, None, None] for i in (0, 1))
    accepted = torch.arange(1, longest + 1)  # j; and d, row by row
    chances = torch.tensor(survival[: longest - 1], dtype=torch.float64).repeat(2 * longest, 1)
    chances[longest:, :1] = 1  # the second half of the rows: draft 2 is certain
    drafted = accepted.repeat(2)
    probabilities = outcome_probabilities(chances, drafted)  # [d and certainty, j]
    rank = probabilities.argsort(1, descending=True).argsort(1)
    chosen = torch.where(rank < counts, accepted, 0)  # [shape, d, j]: j where it is pre-drafted
    nearest = chosen.cummax(2).values
    following = torch.where(nearest == 0, 1, (lengths - accepted + nearest).clamp(min=1))
    hit = torch.from_numpy(np.stack([_hit_rates(shape, longest, hits) for shape in shapes]))[:, None]
    hit = hit * (accepted < drafted[:, None])  # [shape, d, j]
    moves = torch.zeros(*following.shape[:2], 2 * longest, dtype=torch.float64)
    moves.scatter_add_(2, following - 1, probabilities * (1 - hit))
    certain = torch.where(nearest == 0, 2, following).clamp(min=2) - 1 + longest
    moves.scatter_add_(2, certain.clamp(max=2 * longest - 1), probabilities * hit)
    # numpy from here on: torch wakes a team of threads even for products this small, which may take milliseconds.
    each = np.linalg.matrix_power(moves.numpy(), 64)[:, 0]  # from d = 1
    share = (each + np.einsum("si,sij->sj", each, moves.numpy())) / 2  # both phases, should it swing between two
    return (share @ (probabilities * accepted).sum(1).numpy()).tolist()


def _shape(plan: Plan) -> tuple[int, int, int]:
    return plan.draft_length, plan.blocks, plan.alternatives


def margin(rows: int, last: bool, drafting: bool = False) -> float:
    """What drafting must promise, in tokens per second of plain decoding, to be worth it in a batch of `rows` rows.

    last: whether nothing waits for their places. drafting: whether they have been drafting.
    """
    return 1 + math.log2(rows) * (HOLD * UNEVEN if drafting else UNEVEN + (LAST if last else 0))


def _hit_rates(shape: tuple[int, int, int], longest: int, hits: Sequence[float]) -> np.ndarray:
    """[longest] probability that a leaf is hit where j drafts stand and the next one falls, for j = 1, 2, ..."""
    rates = np.zeros(longest)
    for parent, rank in choose_leaves(shape[0], shape[2]):
        rates[parent] += hits[rank]
    return rates


class Acceptance:
    """What was observed, as running means that forget, with guesses to start from.

    `survival` of drafts 2..K, each given the ones before it; and how often leaves are hit, as a multiple of RANKS.
    """

    def __init__(self, draft_length: int) -> None:
        self.tried = [PRIOR_WEIGHT] * (draft_length - 1)
        self.stood = [PRIOR_WEIGHT * PRIOR] * (draft_length - 1)
        self.awaited = self.hit = PRIOR_WEIGHT
        self.judged = 0  # drafts that were the first to be judged
        self.seen = False  # as many of them as a look shows: one alone says nothing
        self._next = 0.0

    def observe(self, plan: Plan, gains: Sequence[Gain]) -> None:
        """A forward of `plan` and what it gave each row. The first draft always stands; so does a known second one."""
        if not plan.drafting:  # it judges nothing; with many rows a small model's forward takes hardly longer than this
            self._next = 0.0
            return
        judged, standing = [0] * (len(self.tried) + 1), [0] * (len(self.tried) + 1)
        for gain in gains:
            judged[min(len(gain.tokens), gain.drafted - 1)] += 1
            standing[len(gain.tokens) - 1] += 1
        certain = sum(gain.known > 1 < min(gain.drafted, len(gain.tokens)) for gain in gains)
        tried = stood = 0
        for draft in reversed(range(len(self.tried))):
            tried, stood = tried + judged[draft + 1], stood + standing[draft + 1]
            if draft == 0:
                tried, stood = tried - certain, stood - certain
            if tried:
                self.tried[draft] = self.tried[draft] * MEMORY + tried
                self.stood[draft] = self.stood[draft] * MEMORY + stood
        self.judged += tried  # the loop ended with the first
        self.seen |= self.judged >= LOOK - 1
        if self._next:  # a hit shows in the forward after it
            self.awaited = self.awaited * MEMORY + self._next
            self.hit = self.hit * MEMORY + sum(gain.known > 1 for gain in gains)
        rates = _hit_rates(_shape(plan), plan.draft_length, RANKS)
        self._next = sum(rates[len(gain.tokens) - 1] for gain in gains if len(gain.tokens) < gain.drafted)

    def relax(self) -> None:
        """Keep the rates, but no more certain than a guess: another text may begin."""
        for draft, tried in enumerate(self.tried):
            share = min(1, PRIOR_WEIGHT / tried)
            self.tried[draft], self.stood[draft] = share * tried, share * self.stood[draft]
        share = min(1, PRIOR_WEIGHT / self.awaited)
        self.awaited, self.hit, self._next = share * self.awaited, share * self.hit, 0.0

    @property
    def survival(self) -> list[float]:
        return [stood / tried for stood, tried in zip(self.stood, self.tried, strict=True)]

    @property
    def hits(self) -> list[float]:
        """Probability that the right token is the drafter's second, third, ... choice, where the first fell."""
        luck = min(self.hit / self.awaited, 1 / sum(RANKS))
        return [luck * rate for rate in RANKS]


@dataclass
class Pause:
    """Plain decoding of a batch size: its forwards since drafting was tried, and how often that was found wanting."""

    since: int = 0
    doubts: int = 0

    @property
    def halvings(self) -> int:
        """Of what looks may lose. One text that is not like the rest brings one doubt, which halves nothing yet."""
        return max(0, self.doubts - 1)

    def judge(self, pays: bool) -> None:
        """Drafting has been tried."""
        self.since, self.doubts = 0, max(0, self.doubts - 1) if pays else min(MOST_DOUBTS, self.doubts + 1)


class Learned:
    """What a run leaves for the next one with the same network and sampling parameters."""

    def __init__(self, draft_length: int) -> None:
        self.acceptance = Acceptance(draft_length)
        self.pauses = defaultdict[int, Pause](Pause)  # by batch size
        self.asked: tuple | None = None
        self.gains = dict[tuple[int, int, int], float]()  # the last expected tokens, and what they follow from
        # By whether forwards are captured and how many threads there are; then by batch size, see `Costs.of`.
        self.costs = defaultdict[tuple[bool, int], dict[int, list[tuple[Plan, float]]]](dict)


class AutoPlanner:
    """Chooses among the device's shapes before every forward.

    What it learns stays with the network: the next run begins with it.

    Args:
        params: how tokens are chosen.
        remeasure: measure the machine anew even if its costs are known.
    """

    def __init__(self, params: SamplingParams, remeasure: bool = False) -> None:
        self.params, self.remeasure = params, remeasure
        self.longest = self._plan_of(LONGEST)
        self.learned = Learned(self.longest.draft_length)
        self.costs: dict[int, list[tuple[Plan, float]]] = {}
        self.captures = False  # whether forwards are CUDA graphs
        self.in_step = True  # whether rows of a batch begin together, as a server's do not
        self.ready: Callable[[Plan, int], bool] = lambda plan, rows: True  # whether a step need not be captured first
        self.begin()

    @property
    def acceptance(self) -> Acceptance:
        return self.learned.acceptance

    def begin(self) -> None:
        """A run begins: nothing is decoding."""
        self._plan = self._running = Plan(1, self.params)  # what to do now, and what was chosen: they differ in a look
        self._size, self._last = 0, False  # batch size of the choice, and whether nothing waits for places in it
        self._left = self._age = 0  # forwards until the next choice, forwards so far

    def prepare(self, runner: Runner, rows: int) -> None:
        kept, key = runner.network.learned, self.params.unseeded
        if key not in kept and len(kept) >= MOST_LEARNED:
            kept.clear()
        self.learned = kept.setdefault(key, Learned(self.longest.draft_length))
        self.acceptance.relax()
        self.captures, self.ready = runner.captures, runner.ready
        if self.remeasure:
            for learned in kept.values():
                learned.costs.clear()
        # To look them up in the file takes as long as several forwards of a small model.
        known = self.learned.costs[self.captures, torch.get_num_threads()]
        if self.remeasure or power_of_two(rows) not in known:
            known |= self._measure(Costs(runner, self.remeasure), rows)
        self.costs = known
        if any(plan.params != self.params for plan, _ in known[1]):
            self.costs = {
                size: [(replace(plan, params=self.params), seconds) for plan, seconds in costs]
                for size, costs in known.items()
            }
        self.remeasure = False
        self.begin()

    def _measure(self, measured: Costs, rows: int) -> dict[int, list[tuple[Plan, float]]]:
        """Costs by batch size, up to the first that holds `rows`."""
        shapes = SHAPES_CUDA if measured.network.device.type == "cuda" else SHAPES
        plans, size, costs = [self._plan_of(shape) for shape in shapes], 1, dict[int, list[tuple[Plan, float]]]()
        while size < 2 * rows:
            costs[size] = measured.of(plans, size)
            # A larger batch leaves fewer slots free: what cannot pay here cannot pay there.
            plans, size = [plan for plan, _ in costs[size]], 2 * size
        return costs

    def _plan_of(self, shape: tuple[int, int, int]) -> Plan:
        length, outcomes, alternatives = shape
        return Plan(length, self.params, outcomes, alternatives)

    def observe(self, plan: Plan, gains: Sequence[Gain]) -> None:
        self.acceptance.observe(plan, gains)

    def first(self, rows: int, last: bool = False) -> Plan:
        size = power_of_two(rows)
        running = self._running if (size, last) == (self._size, self._last) else self.best(size, last)
        # Where prefills are captured, always as many drafts: other numbers are other graphs for each size of a prefill.
        drafts = self.longest.draft_length if self.captures and running.drafting else running.draft_length
        return Plan(drafts, self.params)

    def choose(self, rows: int, last: bool = False) -> Plan:
        size = power_of_two(rows)
        if (size, last) != (self._size, self._last):
            shrunk = self.in_step and size < self._size and not self._running.drafting
            if self._running.drafting:  # by what is best there: another size has other costs
                self._pause.judge(self.best(self._size, self._last).drafting)
            self._size, self._last = size, last
            if shrunk:
                self._plan, self._left = self._running, LOOK_AGAIN
            else:
                self._settle()
        elif not self._left:
            self._turn()
        self._left, self._age = self._left - 1, self._age + 1
        if not self._plan.drafting:
            self._pause.since += 1
        return self._plan

    @property
    def _pause(self) -> Pause:
        return self.learned.pauses[self._size]

    def best(self, rows: int, last: bool = False) -> Plan:
        """The plan with the most expected tokens per second for a batch of `rows`; the running one, if hardly worse."""
        return self._best(rows, last, self._rates(rows))

    def _best(self, rows: int, last: bool, rates: dict[Plan, float]) -> Plan:
        plain = next(plan for plan in rates if not plan.drafting)
        best, running = max(rates, key=lambda plan: rates[plan]), self._running
        least = rates[plain] * margin(rows, last, running.drafting)
        if running.drafting and least < rates.get(running, 0.0) >= rates[best] / MARGIN:
            return running
        return best if rates[best] > MARGIN * least else plain

    def _rates(self, rows: int) -> dict[Plan, float]:
        """Expected tokens per second of every plan that can pay."""
        costs, learned = self.costs[rows], self.learned
        asked = tuple(self.acceptance.survival), tuple(self.acceptance.hits)
        # Else nothing was observed since: a run that only decodes plainly need not wait.
        if asked != learned.asked or any(_shape(plan) not in learned.gains for plan, _ in costs):
            shapes = list({_shape(plan): None for known in self.costs.values() for plan, _ in known})
            gains = expected_tokens(asked[0], shapes, asked[1])
            learned.asked, learned.gains = asked, dict(zip(shapes, gains, strict=True))
        return {plan: learned.gains[_shape(plan)] / seconds for plan, seconds in costs}

    def _turn(self) -> None:
        """What comes when a plan has had its time: after plain decoding a look at drafting, else another choice."""
        tried = self._plan.drafting
        if not tried:
            look, wait = self._next_look(self._rates(self._size))
            if look is not None and wait <= 0:
                self._plan, self._left = look, LOOK
                self._pause.since = 0  # already, as the batch may change before it is judged
                return
        self._settle()
        if tried:
            self._pause.judge(self._running.drafting)

    def _settle(self) -> None:
        """Choose a plan, and for how many forwards."""
        rates = self._rates(self._size)
        self._plan = self._running = self._best(self._size, self._last, rates)
        if self._running.drafting:
            self._left = min(max(self._age, 4), THINK_AGAIN)
        else:
            self._left = max(1, self._next_look(rates)[1])

    def _next_look(self, rates: dict[Plan, float]) -> tuple[Plan | None, int]:
        """What to look at after plain decoding (None if nothing can pay), and how many more plain forwards before."""
        seconds = dict(self.costs[self._size])
        plain = next(plan for plan in rates if not plan.drafting)
        least = MARGIN * margin(self._size, self._last) * rates[plain]
        drafting = [plan for plan in rates if plan.drafting]
        if not any(plan.draft_length / seconds[plan] > least for plan in drafting):  # though all drafts stood
            return None, sys.maxsize
        # Any of them shows how far drafts stand.
        ready = [plan for plan in drafting if self.ready(plan, self._size)]
        best = max(ready or drafting, key=lambda plan: rates[plan])
        lost = 0 if ready else CAPTURE / seconds[plain]  # in plain forwards
        if self._size > 1 and self.in_step:
            lost += STAGGER_LAST if self._last else STAGGER
        if not self.acceptance.seen:
            return best, max(FIRST_LOOK, math.ceil(lost / FIRST_LOOK_SHARE)) - self._pause.since
        lost += LOOK * seconds[best] / seconds[plain] - 1 - (LOOK - 1) * rates[best] * seconds[best]
        return best, (max(LOOK_AGAIN, math.ceil(lost / LOOK_SHARE)) << self._pause.halvings) - self._pause.since
