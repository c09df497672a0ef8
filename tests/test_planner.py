"""What a plan is expected to gain, and which plan is chosen."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar import TidarError, TidarModel
from tidar.decode.costs import REPEATS, ROUNDS, Costs, _Bench
from tidar.decode.engine import Engine, Limits
from tidar.decode.planner import (
    CAPTURE,
    FIRST_LOOK,
    FIRST_LOOK_SHARE,
    LOOK,
    LOOK_AGAIN,
    LOOK_SHARE,
    MARGIN,
    MEMORY,
    MOST_DOUBTS,
    PRIOR,
    PRIOR_WEIGHT,
    SHAPES,
    SHAPES_CUDA,
    STAGGER,
    STAGGER_LAST,
    THINK_AGAIN,
    Acceptance,
    AutoPlanner,
    Pause,
    expected_tokens,
    margin,
)
from tidar.decode.runner import Gain, Runner
from tidar.decode.step import Plan, choose_leaves
from tidar.sampling import SamplingParams, likely_outcomes, outcome_probabilities
from tiny import PROMPTS, continuations, network_of, tiny_network

rates = st.floats(0.01, 0.99)


@given(st.lists(rates, min_size=1, max_size=6), st.data())
def test_outcome_probabilities_are_those_of_every_way_drafts_can_fall(survival, data):
    """Against all 2 ** (K-1) sequences of independent verdicts."""
    length = len(survival) + 1
    drafted = data.draw(st.integers(1, length))
    wanted = [0.0] * length
    for verdicts in itertools.product((True, False), repeat=drafted - 1):
        chance = 1.0
        for stands, rate in zip(verdicts, survival, strict=False):
            chance *= rate if stands else 1 - rate
        accepted = 1 + next((i for i, stands in enumerate(verdicts) if not stands), drafted - 1)
        wanted[accepted - 1] += chance
    got = outcome_probabilities(torch.tensor([survival], dtype=torch.float64), torch.tensor([drafted]))[0]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))
    count = data.draw(st.integers(1, length))
    chosen = likely_outcomes(torch.tensor([survival], dtype=torch.float64), torch.tensor([drafted]), count)[0].tolist()
    assert chosen == sorted(set(chosen))
    rest = [p for j, p in enumerate(wanted, 1) if j not in chosen]
    assert min(wanted[j - 1] for j in chosen) >= max(rest, default=0) - 1e-12


HITS = [0.4, 0.2, 0.1]


def simulated(survival: list[float], length: int, outcomes: int, alternatives: int, steps: int) -> float:
    """Mean tokens a forward, by playing the decoder with independent drafts."""
    generator = torch.Generator().manual_seed(0)

    def happens(chance: float) -> bool:
        return bool(torch.rand((), generator=generator) < chance)

    drafted, known, total = 1, 1, 0
    for _ in range(steps):
        rates = [1.0 if known > 1 and i == 0 else rate for i, rate in enumerate(survival[: length - 1])]
        chances = torch.tensor([rates], dtype=torch.float64)
        chosen = likely_outcomes(chances, torch.tensor([drafted]), outcomes)[0].tolist()
        accepted = 1
        while accepted < drafted and happens(rates[accepted - 1]):
            accepted += 1
        total += accepted
        leaves = [rank for draft, rank in choose_leaves(length, alternatives) if draft == accepted - 1]
        known = 1 + (accepted < drafted and happens(sum(HITS[rank] for rank in leaves)))
        before = [j for j in chosen if j <= accepted]
        drafted = max(length - (accepted - before[-1]) if before else 1, known)
    return total / steps


@pytest.mark.parametrize(
    ("length", "outcomes", "alternatives"),
    [(2, 1, 0), (4, 1, 0), (4, 2, 0), (4, 4, 3), (8, 2, 6), (8, 8, 0), (2, 1, 2), (4, 1, 9)],
)
@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_expected_tokens_are_those_of_a_played_decoder(length, outcomes, alternatives, rate):
    survival, shape = [rate * 0.97**i for i in range(length - 1)], (length, outcomes, alternatives)
    # Among others, as all are computed together.
    expected, *_ = expected_tokens([*survival, *[0.5] * (8 - length)], [shape, (1, 0, 0), (8, 3, 2)], HITS)
    assert expected == pytest.approx(simulated(survival, *shape, 6000), rel=0.05)


@given(st.lists(rates, min_size=7, max_size=7), st.integers(2, 8))
def test_without_pruning_the_expectation_is_a_sum_of_products(survival, length):
    wanted, product = 1.0, 1.0
    for rate in survival[: length - 1]:
        product *= rate
        wanted += product
    full, pruned, plain = expected_tokens(survival, [(length, length, 0), (length, 1, 0), (1, 0, 0)])
    assert full == pytest.approx(wanted)
    assert 1 <= pruned <= wanted + 1e-9
    assert plain == pytest.approx(1)


@pytest.mark.parametrize("ladder", [SHAPES, SHAPES_CUDA])
def test_ladders_begin_with_plain_decoding_and_have_no_step_twice(ladder):
    assert ladder[0] == (1, 0, 0)
    assert len(set(ladder)) == len(ladder)
    longest = AutoPlanner(SamplingParams()).longest
    for length, blocks, leaves in ladder:
        plan = Plan(length, outcomes=blocks, alternatives=leaves)
        assert (plan.blocks, len(plan.leaves)) == (blocks, leaves)
        assert length <= longest.draft_length
        assert plan.slots <= longest.slots


def plan_of(shape: tuple[int, ...]) -> Plan:
    length, outcomes, *leaves = shape
    return Plan(length, outcomes=outcomes, alternatives=sum(leaves))


def planner_with(costs: dict[tuple[int, ...], float]) -> AutoPlanner:
    planner = AutoPlanner(SamplingParams())
    planner.costs = {1: [(plan_of(shape), cost) for shape, cost in costs.items()]}
    planner.acceptance.seen = True  # the guesses are what was observed
    return planner


@settings(max_examples=20)
@given(st.floats(0.001, 0.2), st.floats(0.05, 0.95), st.lists(st.floats(0.8, 1.3), min_size=40, max_size=40))
def test_the_best_plan_is_chosen_by_brute_force(slope, rate, noise):
    costs = {shape: 1 + slope * plan_of(shape).slots * noise[i] for i, shape in enumerate(SHAPES)}
    planner = planner_with(costs)
    planner.acceptance.stood = [rate * tried for tried in planner.acceptance.tried]
    drafting = [shape for shape in SHAPES if shape[0] > 1]
    speed = {plan_of(shape): expected_tokens([rate] * 15, [shape])[0] / costs[shape] for shape in drafting}
    best = max(speed.values())
    chosen = planner.choose(1)
    if best > MARGIN / costs[SHAPES[0]]:
        assert speed[chosen] == pytest.approx(best)
    else:
        assert not chosen.drafting


def looks(plans: list[Plan]) -> list[tuple[bool, int]]:
    """Runs of equal kind: (drafting, forwards)."""
    return [(drafting, len(list(run))) for drafting, run in itertools.groupby(plan.drafting for plan in plans)]


@pytest.mark.parametrize("cost", [3.8, 10.0])
def test_plain_decoding_where_drafts_do_not_pay_with_rarer_and_rarer_looks(cost):
    planner = planner_with({shape: 1.0 if shape[0] == 1 else cost for shape in SHAPES})
    gain = max(expected_tokens([PRIOR] * 15, SHAPES))  # nothing is observed
    afford = math.ceil((LOOK * cost - 1 - (LOOK - 1) * gain) / LOOK_SHARE)
    assert afford > LOOK_AGAIN
    waits = [times * afford for times in (1, 1, 2, 4, 4, 4)]
    wanted = [run for wait in waits for run in ((False, wait), (True, LOOK))]
    total = sum(count for _, count in wanted)
    assert looks([planner.choose(1) for _ in range(total)]) == wanted


def test_looks_that_seem_to_lose_nothing_become_rarer_too():
    """Drafts promise more than plain decoding gives, but less than they must in a batch."""
    planner, times = planner_with({}), (1, 1, 2, 4, 4)
    gain = expected_tokens([PRIOR] * 15, [(8, 8, 0)])[0]
    planner.in_step, planner.costs = False, {16: [(plan_of((1, 0)), 1.0), (plan_of((8, 8)), gain / 1.28)]}
    wanted = [run for wait in times for run in ((False, wait * LOOK_AGAIN), (True, LOOK))]
    assert looks([planner.choose(16) for _ in range(sum(count for _, count in wanted))]) == wanted


@pytest.mark.parametrize(
    ("rows", "cost", "captured"), [(1, 3.0, True), (1, 4.0, True), (1, 4.0, False), (16, 2.6, True)]
)
def test_the_first_look_comes_as_soon_as_what_it_costs_beside_its_forwards_is_a_small_share(rows, cost, captured):
    planner = planner_with({(1, 0): 1e-3, (8, 8): cost * 1e-3})
    planner.costs[rows], planner.ready = planner.costs[1], lambda plan, rows: captured
    planner.acceptance.seen = False
    planner.learned.pauses[rows].doubts = MOST_DOUBTS  # as another text may have left
    lost = (STAGGER if rows > 1 else 0) + (0 if captured else CAPTURE * 1e3)
    wait = max(FIRST_LOOK, math.ceil(lost / FIRST_LOOK_SHARE))
    assert (wait == FIRST_LOOK) == (rows == 1 and captured)
    assert looks([planner.choose(rows) for _ in range(wait + LOOK)]) == [(False, wait), (True, LOOK)]
    for seen in (False, False, True):  # as a short run may be all that came before
        planner.observe(plan_of((8, 8)), [Gain(8, 1, [0])])
        assert planner.acceptance.seen == seen
    assert not any(planner.choose(rows).drafting for _ in range(LOOK_AGAIN))


def test_good_drafts_are_found_where_the_guess_is_against_them():
    """Costs of smollm2-135m in float32 on two cores: the guess promises less than plain decoding gives."""
    planner = planner_with({(1, 0): 31.6, (4, 1, 3): 74.9, (8, 1, 5): 88.6, (8, 3, 4): 104.8, (16, 2, 6): 147.3})
    planner.acceptance.seen = False
    planner.observe(Plan(8, outcomes=3), [Gain(8, 1, [0])])  # of a run before it that was two tokens long
    assert not planner.best(1).drafting
    drafting = 0
    for _ in range(60):
        plan = planner.choose(1)
        planner.observe(plan, [Gain(plan.draft_length, 1, [0] * plan.draft_length)])
        drafting += plan.drafting
    assert drafting == 60 - FIRST_LOOK


def test_there_is_no_look_at_what_could_not_pay_if_all_drafts_stood():
    """64 rows must be promised more than one, the more if nothing waits for their places."""
    for promised, waits, wanted in ((1.4, True, False), (1.6, True, True), (1.6, False, False), (2.0, False, True)):
        planner = planner_with({})
        planner.costs = {64: [(plan_of((1, 0)), 1.0), (plan_of((8, 8)), 8 / promised)]}
        planner.acceptance.stood = [0.0] * 15
        plans = [planner.choose(64, not waits) for _ in range(20_000)]
        assert any(plan.drafting for plan in plans) == wanted


def test_looks_lose_no_more_than_their_share():
    planner = planner_with({(1, 0): 1.0, (8, 8): 4.0})
    planner.acceptance.stood = [0.0] * 15
    plans = [planner.choose(1) for _ in range(20_000)]
    drafting = sum(plan.drafting for plan in plans)
    assert 0 < 3 * drafting < 1.01 * LOOK_SHARE * len(plans)  # each gains one token and costs four forwards


def test_looks_of_a_batch_pay_for_leaving_its_rows_staggered():
    planner = planner_with({(1, 0): 1.0, (8, 8): 1.2})
    planner.costs[16] = planner.costs[1]
    planner.acceptance.stood = [0.0] * 15
    lost = LOOK * 1.2 - LOOK + STAGGER  # a draft that falls leaves one token
    assert looks([planner.choose(16) for _ in range(12_000)])[0] == (False, math.ceil(lost / LOOK_SHARE))


def test_looks_come_where_they_leave_little_staggered():
    """Once no prompt waits, what was to be looked at long ago is looked at at once."""
    planner = planner_with({(1, 0): 1.0, (8, 8): 1.2})
    planner.costs[16] = planner.costs[1]
    planner.acceptance.stood = [0.0] * 15
    wait = math.ceil((LOOK * 1.2 - LOOK + STAGGER_LAST) / LOOK_SHARE)
    assert looks([planner.choose(16) for _ in range(wait)]) == [(False, wait)]
    assert looks([planner.choose(16, True) for _ in range(1 + LOOK)]) == [(False, 1), (True, LOOK)]


def decode(planner: AutoPlanner, rows: int, tokens: int, gain, waiting: float = 0.0) -> tuple[float, int]:
    """A run of rows in step: its time in plain forwards, and how many of its forwards drafted.

    gain: tokens a forward that judges drafts, given whether no prompt waits. waiting: share of the run before that.
    """
    planner.begin()
    planner.acceptance.relax()
    planner.costs[rows] = planner.costs[1]
    cost = planner.costs[1][1][1]
    made, time, drafting, judging = 0, 0.0, 0, False
    while made < tokens:
        last = made >= waiting * tokens
        plan = planner.choose(rows, last)
        judging &= plan.drafting
        new = gain(last) if judging else 1
        planner.observe(plan, [Gain(8 if judging else 1, 1, [0] * new)] * rows)
        made, time, drafting = made + new, time + (cost if plan.drafting else 1), drafting + plan.drafting
        judging = plan.drafting
    return time, drafting


@pytest.mark.parametrize(
    ("rows", "tokens", "waiting", "most"),
    [(1, 128, 0, 1.06), (4, 500, 0.8, 1.06), (16, 500, 0.8, 1.06), (16, 128, 0, 1.25)],
)
def test_a_text_now_and_then_that_is_hard_to_draft_costs_little(rows, tokens, waiting, most):
    """Of every 40 runs one gains nothing by drafting, the others 4 tokens a forward that costs 2.2 plain ones."""
    planner, time, best = planner_with({(1, 0): 1.0, (8, 8): 2.2}), 0.0, 0.0
    for run in range(200):
        good = run % 40 != 20
        time += decode(planner, rows, tokens, lambda last, good=good: 4 if good else 1, waiting)[0]
        best += 2.2 * tokens / 4 if good else tokens
    assert 1 < time / best < most


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_drafting_that_only_pays_at_the_end_of_answers_begins_in_few_runs(rows):
    """As with MT-Bench in batches of 16: a look near the end promises what the next run's beginning does not keep."""
    planner = planner_with({(1, 0): 1.0, (8, 8): 2.2})
    runs = [decode(planner, rows, 500, lambda last: 3 if last else 1, waiting=0.8) for _ in range(60)]
    time, drafting = map(sum, zip(*runs, strict=True))
    assert time < 1.005 * 60 * 500
    assert 0 < drafting < LOOK_SHARE * 60 * 500 / 2


def test_doubts_go_as_drafting_lasts():
    pause = Pause(since=10)
    for _ in range(2 * MOST_DOUBTS):
        pause.judge(pays=False)
    assert pause == Pause(0, MOST_DOUBTS)
    assert pause.halvings == MOST_DOUBTS - 1
    planner = planner_with({(1, 0): 1.0, (8, 8): 2.2})
    planner.learned.pauses[4] = pause
    time, drafting = decode(planner, 4, 8 * 2 * THINK_AGAIN, lambda last: 8)
    assert time == pytest.approx(2.2 * drafting)  # all of it
    assert pause == Pause(0, 0)


def test_drafting_of_a_server_is_judged_though_its_requests_come_and_go():
    planner = planner_with({(1, 0): 1.0, (8, 8): 2.2})
    planner.in_step, planner.costs[4] = False, planner.costs[1]
    planner.costs[8] = [(plan, 100.0 if plan.drafting else 1.0) for plan, _ in planner.costs[1]]
    planner.acceptance.stood = list(planner.acceptance.tried)  # all drafts stand
    for size in (1, 4, 8):
        planner.learned.pauses[size] = Pause(7, 2)
    for size, drafts in ((4, True), (1, True), (4, True), (8, False)):  # what eight cost says nothing of four
        assert all(planner.choose(size).drafting == drafts for _ in range(4))
    assert {size: pause.doubts for size, pause in planner.learned.pauses.items()} == {1: 1, 4: 0, 8: 2}
    assert planner.choose(4).drafting
    planner.acceptance.stood = [0.0] * 15
    assert not planner.choose(1).drafting
    assert planner.learned.pauses[4] == Pause(0, 1)


def test_a_look_that_is_cut_short_is_not_taken_again_at_once():
    planner = planner_with({(1, 0): 1.0, (8, 8): 2.2})
    planner.acceptance.stood = [0.0] * 15
    planner.in_step, planner.costs[2] = False, planner.costs[1]
    while not planner.choose(1).drafting:
        pass
    assert not planner.choose(2).drafting
    assert not any(planner.choose(1).drafting for _ in range(LOOK_AGAIN))


def test_drafting_that_runs_needs_less_to_go_on():
    rate, rows, shape = 0.5, 16, (8, 8, 0)
    gain = expected_tokens([rate] * 15, [shape])[0]
    for promised, goes_on in ((1.25, True), (1.15, True), (1.1, False)):
        planner = planner_with({})
        planner.acceptance.stood = [rate * tried for tried in planner.acceptance.tried]
        planner.costs = {rows: [(plan_of((1, 0, 0)), 1.0), (plan_of(shape), gain / promised)]}
        assert not planner.best(rows).drafting
        planner._running = planner.costs[rows][1][0]
        assert planner.best(rows).drafting == planner.best(rows, last=True).drafting == goes_on


def test_a_servers_rows_are_never_in_step():
    planner = planner_with({(1, 0): 1.0, (8, 8): 1.2})
    planner.costs[16], planner.in_step = planner.costs[1], False
    planner.acceptance.stood = [0.0] * 15
    wait = max(LOOK_AGAIN, math.ceil((LOOK * 1.2 - LOOK) / LOOK_SHARE))
    assert looks([planner.choose(16) for _ in range(wait + LOOK)]) == [(False, wait), (True, LOOK)]


def test_a_look_captures_nothing_if_it_can():
    planner = planner_with({(1, 0): 1e-3, (8, 8): 4e-3, (4, 4): 8e-3})
    for captured, wanted in (((4, 4), {1, 4}), ((8, 8), {1, 8}), ((2, 2), {1})):
        planner.ready = lambda plan, rows, shape=captured: plan.key == plan_of(shape).key
        planner.begin()
        plans = [planner.choose(1) for _ in range(3000)]
        assert {plan.draft_length for plan in plans} == wanted
    while not (plan := planner.choose(1)).drafting:  # once the capture is a small share
        pass
    assert plan.draft_length == 8


def test_prompts_that_come_in_a_look_are_prefilled_plainly():
    planner = planner_with({(1, 0): 1.0, (8, 8): 6.0})
    planner.captures = True
    while not planner.choose(1).drafting:
        pass
    assert not planner.first(1).drafting


def test_where_no_drafting_can_pay_there_are_no_looks(monkeypatch):
    planner = planner_with({(1, 0): 1.0})
    asked = []
    monkeypatch.setattr(planner, "_rates", lambda rows, own=planner._rates: asked.append(rows) or own(rows))
    assert not any(planner.choose(1).drafting for _ in range(2000))
    assert len(asked) < 10


def test_a_look_that_finds_good_drafts_ends_plain_decoding():
    planner = planner_with({(1, 0): 1.0, (8, 8): 1.1})
    planner.acceptance.stood = [0.0] * 15
    assert looks([planner.choose(1) for _ in range(LOOK_AGAIN)]) == [(False, LOOK_AGAIN)]
    for _ in range(40):
        plan = planner.choose(1)
        assert plan.drafting
        planner.observe(plan, [Gain(8, 1, [0] * 8)] * 64)


def test_a_running_plan_is_left_only_for_a_much_better_one():
    planner = planner_with({(1, 0): 1.0, (8, 8): 1.2, (4, 4): 1.2})
    planner.acceptance.stood = list(planner.acceptance.tried)  # all drafts stand
    assert planner.choose(1).draft_length == 8
    for better, wanted in ((1.04, 8), (1.06, 4)):
        cost = 1.2 * 4 / 8 / better
        planner.costs[1] = [(plan, cost if plan.draft_length == 4 else old) for plan, old in planner.costs[1]]
        assert planner.best(1).draft_length == wanted
    # Plain decoding needs no margin to be returned to.
    planner.costs[1] = [(plan, 9.0 if plan.drafting else 1.0) for plan, _ in planner.costs[1]]
    assert not planner.best(1).drafting


def test_what_cannot_pay_is_not_measured_for_larger_batches(monkeypatch):
    asked = {}

    def of(self, plans, rows):
        asked[rows] = {(plan.draft_length, plan.blocks, plan.alternatives) for plan in plans}
        return [(plan, 1.0) for plan in plans if plan.draft_length != 8 or rows < 4]

    monkeypatch.setattr(Costs, "of", of)
    planner = AutoPlanner(SamplingParams())
    planner.prepare(Runner(network_of("llama")), 5)
    assert list(asked) == list(planner.costs) == [1, 2, 4, 8]
    assert asked[1] == asked[2] == asked[4] == set(SHAPES)
    assert asked[8] == {shape for shape in SHAPES if shape[0] != 8}


def test_costs_are_looked_up_once(monkeypatch):
    made, network = [], tiny_network("llama")
    monkeypatch.setattr(Costs, "of", lambda self, plans, rows: made.append(rows) or [(plan, 1.0) for plan in plans])
    for rows, remeasure, expected in ((2, False, [1, 2]), (1, False, []), (4, False, [1, 2, 4]), (1, True, [1])):
        made.clear()
        planner = AutoPlanner(SamplingParams(seed=rows), remeasure)
        planner.prepare(Runner(network), rows)
        assert made == expected
        assert all(plan.params.seed == rows for plan, _ in planner.costs[1])


def test_the_next_run_begins_with_what_was_learned():
    network = tiny_network("llama")
    first, second = AutoPlanner(SamplingParams(seed=1)), AutoPlanner(SamplingParams(seed=2))
    first.prepare(Runner(network), 1)
    for _ in range(300):
        first.observe(Plan(4), [Gain(4, 1, [0])])
    second.prepare(Runner(network), 1)
    assert second.learned is first.learned
    other = tiny_network("llama")
    first.prepare(Runner(other), 1)
    assert first.learned is not second.learned
    first, second = second, first
    second.prepare(Runner(network), 1)
    assert second.acceptance.survival[0] < 0.05
    assert second.acceptance.tried[0] == pytest.approx(PRIOR_WEIGHT)
    sampled = AutoPlanner(SamplingParams(0.8))
    sampled.prepare(Runner(network), 1)
    assert sampled.acceptance.survival[0] == pytest.approx(PRIOR)
    cheap, dear = ([(plan_of((1, 0)), 1.0), (plan_of((8, 8)), cost)] for cost in (1.1, 100.0))
    sampled.costs[1] = cheap
    assert all(sampled.choose(1).drafting for _ in range(100))
    sampled.prepare(Runner(network), 1)
    sampled.costs[1] = cheap
    assert sampled.choose(1).drafting
    sampled.costs[1] = dear  # thought of after four forwards, as in every run's beginning
    assert [sampled.choose(1).drafting for _ in range(4)] == [True] * 3 + [False]


@pytest.mark.parametrize("forwards", [10, 60, 256])
def test_short_runs_look_at_drafting_again_too(forwards):
    """Bad text stops the drafting; good text in runs that are shorter than the pause brings it back."""
    planner = planner_with({(1, 0): 1.0, (8, 8): 1.3, (4, 4): 1.1})

    def play(stands: bool) -> int:
        planner.begin()
        planner.acceptance.relax()
        drafting = 0
        for _ in range(forwards):
            plan = planner.choose(1)
            length = plan.draft_length
            planner.observe(plan, [Gain(length, 1, [0] * (length if stands else 1))])
            drafting += plan.drafting
        return drafting

    while play(stands=False):
        if planner._running == planner.costs[1][0][0] and planner.acceptance.survival[0] < 0.05:
            break
    pause = planner.learned.pauses[1]
    afford = math.ceil((LOOK * 1.1 - LOOK) / LOOK_SHARE)  # as no draft stood
    for _ in range(2 + ((max(LOOK_AGAIN, afford) << pause.halvings) - pause.since) // forwards):
        last = play(stands=True)
    assert last == forwards


def test_a_prefill_drafts_only_if_the_next_forward_will():
    planner = planner_with({(1, 0): 1.0, (8, 8): 10.0})
    assert not planner.first(1).drafting
    planner = planner_with({(1, 0): 1.0, (8, 8, 5): 1.1})
    plan = planner.choose(1)
    assert planner.first(1) == Plan(plan.draft_length)
    planner.captures = True
    assert planner.first(1) == Plan(planner.longest.draft_length)


def test_rows_that_end_at_different_times_must_be_worth_it():
    planner = planner_with({(1, 0): 1.0, (8, 8): 1.0})
    gain = expected_tokens([PRIOR] * 15, [(8, 8, 0)])[0]
    for promised, alone, together in ((1.03, False, False), (1.1, True, False), (1.35, True, True)):
        for rows in (1, 4):
            planner.costs[rows] = [(plan, gain / promised if plan.drafting else 1.0) for plan, _ in planner.costs[1]]
            assert planner.best(rows).drafting == (alone if rows == 1 else together)


def test_once_nothing_waits_drafting_must_be_worth_the_slowest_row():
    """With the same promise: rows that draft go on, but do not begin then."""
    rate, rows = 0.5, 64
    shape = (8, 8, 0)
    gain = expected_tokens([rate] * 15, [shape])[0]
    between = (margin(rows, False) + margin(rows, True)) / 2
    planner = planner_with({})
    planner.acceptance.stood = [rate * tried for tried in planner.acceptance.tried]
    planner.costs = {rows: [(plan_of((1, 0, 0)), 1.0), (plan_of(shape), gain / (MARGIN * between))]}
    for begins in (True, False):
        planner.begin()
        assert planner.first(rows, not begins).drafting == begins
        assert [planner.choose(rows, last).drafting for last in (not begins, True)] == [begins, begins]
    assert planner.choose(rows, False).drafting
    assert margin(1, True) == margin(1, False) == 1 < margin(4, False) < margin(16, False) < margin(16, True)


def test_another_batch_size_is_another_choice():
    planner = planner_with({(1, 0): 1.0, (8, 8): 1.1})
    planner.costs[2] = [(plan, 100.0 if plan.drafting else 1.0) for plan, _ in planner.costs[1]]
    planner.in_step = False
    assert planner.choose(1).drafting
    assert not planner.choose(2).drafting
    assert planner.choose(1).drafting


def test_a_batch_that_decodes_plainly_and_shrinks_drafts_only_if_what_is_left_lasts():
    planner = planner_with({(1, 0): 1.0, (8, 8): 1.1})
    drafts, dear = planner.costs[1], [(plan, 100.0 if plan.drafting else 1.0) for plan, _ in planner.costs[1]]
    planner.costs |= {8: dear, 4: drafts, 2: drafts}
    sizes = [8] * 3 + [4] * 5 + [2] * (LOOK_AGAIN + 1)
    assert [planner.choose(size, True).drafting for size in sizes] == [False] * (len(sizes) - 1) + [True]
    assert planner.choose(1, True).drafting  # it drafts, so it goes on
    planner.begin()
    assert planner.choose(2, True).drafting
    planner.costs[1] = dear
    assert not planner.choose(1, True).drafting  # else it is another choice
    planner.begin()
    planner.acceptance.stood = [0.0] * 15
    while not planner.choose(4, True).drafting:
        pass
    assert not planner.choose(2, True).drafting  # so ends a look


def test_hits_on_leaves_are_learned_and_known_drafts_say_nothing_of_survival():
    seen, plan = Acceptance(4), Plan(4, alternatives=9)
    falls, follows = Gain(4, 1, [0]), Gain(4, 2, [0] * 4)
    for _ in range(300):  # every fall is hit
        seen.observe(plan, [falls])
        seen.observe(plan, [follows])
    assert sum(seen.hits) == pytest.approx(1, abs=0.05)
    assert seen.survival == pytest.approx([0, 1, 1], abs=0.05)
    for _ in range(300):
        seen.observe(plan, [falls])
    assert sum(seen.hits) == pytest.approx(0, abs=0.05)


def test_acceptance_is_learned_and_forgotten():
    seen = Acceptance(4)
    plan = Plan(4)
    for _ in range(300):
        seen.observe(plan, [Gain(4, 1, [0] * 3)])
    assert seen.survival == pytest.approx([1, 1, 0], abs=0.02)
    for _ in range(300):
        seen.observe(plan, [Gain(2, 1, [0])])
    assert seen.survival == pytest.approx([0, 1, 0], abs=0.02)  # what was not tried keeps its rate
    seen.observe(plan, [Gain(1, 1, [0])] * 2)
    assert seen.survival == pytest.approx([0, 1, 0], abs=0.02)


@given(st.lists(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=9), max_size=5))
def test_a_forward_is_observed_as_its_rows_are(forwards):
    """Against counting draft by draft; the past fades once a forward, whatever the batch."""
    seen = Acceptance(6)
    tried, stood = list(seen.tried), list(seen.stood)
    for rows in forwards:
        rows = [(min(pair), max(pair)) for pair in rows]
        for draft in range(5):
            judged = [a for a, d in rows if draft < min(a, d - 1)]
            if judged:
                tried[draft] = tried[draft] * MEMORY + len(judged)
                stood[draft] = stood[draft] * MEMORY + sum(a > draft + 1 for a in judged)
        seen.observe(Plan(6), [Gain(d, 1, [0] * a) for a, d in rows])
    assert (seen.tried, seen.stood) == (tried, stood)


@settings(max_examples=10)
@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=40), st.sampled_from(["llama", "gpt_neox"]))
def test_greedy_output_does_not_depend_on_the_plan_of_any_step(shapes, arch):
    """Draft length and outcomes change from forward to forward, plain decoding in between."""

    class Scripted:
        longest = Plan(16)

        def __init__(self) -> None:
            self.shapes = itertools.cycle(shapes)

        def prepare(self, runner, rows):
            pass

        def first(self, rows, last=False):
            return plan_of(next(self.shapes))

        def choose(self, rows, last=False):
            return plan_of(next(self.shapes))

        def observe(self, plan, gains):
            assert all(1 <= len(gain.tokens) <= gain.drafted <= plan.draft_length for gain in gains)

    answers = {}
    for updates in Engine(network_of(arch), Scripted()).run(PROMPTS, Limits(20), 3):
        answers.update({u.answer.row: u.answer.token_ids for u in updates})
    assert [answers[i] for i in range(len(PROMPTS))] == [c[:20] for c in continuations(arch)]


def test_costs_are_measured_once_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tidar.decode.costs.cache_folder", lambda: tmp_path)
    network, plans = network_of("llama"), [Plan(1), Plan(2, outcomes=1), Plan(4, outcomes=4)]
    first = Costs(Runner(network))
    measured = first.of(plans, 2)
    assert measured[0][0] == plans[0]
    assert all(seconds > 0 for _, seconds in measured)
    assert capsys.readouterr().err.count("measuring") == 1
    again = Costs(Runner(network))
    assert again.of(plans, 2) == measured
    assert not again.measured
    assert not capsys.readouterr().err
    (file,) = (tmp_path / "costs").iterdir()
    assert json.loads(file.read_text())["network"]["model"]["model_type"] == "llama"
    file.write_text("{broken")
    assert Costs(Runner(network)).known == {}
    file.write_text(json.dumps({"seconds": {"2 x 1/0/0": 0, "2 x 2/1/0": float("nan"), "2 x 4/4/0": 0}}))
    assert Costs(Runner(network)).known == {"2 x 4/4/0": 0}
    assert Costs(Runner(network_of("qwen2"))).path != file

    class Captured(Runner):
        captures = True

    assert Costs(Captured(network)).path != file  # a traced run on a GPU is eager, others are not


def test_auto_decodes_what_generate_does():
    network = network_of("llama")
    answers = {}
    for updates in Engine(network, AutoPlanner(SamplingParams())).run(PROMPTS, Limits(30), 2):
        answers.update({u.answer.row: u.answer.token_ids for u in updates})
    assert [answers[i] for i in range(len(PROMPTS))] == [c[:30] for c in continuations("llama")]


def test_costs_that_cannot_be_kept_are_no_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr("tidar.decode.costs.cache_folder", lambda: tmp_path / "file" / "below")
    costs = Costs(Runner(network_of("llama")))
    assert costs.of([Plan(1), Plan(2, outcomes=1)], 1)
    assert costs.of([Plan(1), Plan(2, outcomes=1)], 2)
    assert capsys.readouterr().err.count("cannot be kept") == 1


def timed(monkeypatch, tmp_path, seconds) -> None:
    """Costs are kept in `tmp_path`; a step of a plan takes seconds(plan)."""
    monkeypatch.setattr("tidar.decode.costs.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("tidar.decode.costs._Bench.seconds", lambda bench, plan: seconds(plan))


def test_costs_of_others_and_of_a_run_that_was_ended_are_kept(tmp_path, monkeypatch):
    def seconds(plan):
        if plan.draft_length == 8:
            raise KeyboardInterrupt
        return 1.0

    timed(monkeypatch, tmp_path, seconds)
    runner, plans = Runner(network_of("llama")), [Plan(1), Plan(2, outcomes=1)]
    first, second = Costs(runner), Costs(runner)  # both before there is a file
    first.of(plans, 1)
    second.of(plans, 2)
    anew = Costs(runner, remeasure=True)
    assert not anew.known
    with pytest.raises(KeyboardInterrupt):
        anew.of([*plans, Plan(4, outcomes=1), Plan(8, outcomes=1)], 4)
    assert set(Costs(runner).known) == {
        *(f"{rows} x {shape}" for rows in (1, 2, 4) for shape in ("1/0/0", "2/1/0")),
        "4 x 4/1/0",
    }


def test_what_would_be_slower_though_all_drafts_stood_is_no_choice(tmp_path, monkeypatch):
    timed(monkeypatch, tmp_path, lambda plan: {1: 1.0, 2: 2.4, 4: 3.9}[plan.draft_length])
    plans = [Plan(1), Plan(2, outcomes=1), Plan(2), Plan(4, outcomes=1)]
    for _ in range(2):  # measured, and read from the file
        assert [plan for plan, _ in Costs(Runner(network_of("llama"))).of(plans, 1)] == [plans[0], plans[3]]


def test_truncation_has_costs_of_its_own(tmp_path, monkeypatch):
    timed(monkeypatch, tmp_path, lambda plan: 1.0)
    ways = [
        {},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.8, "top_p": 0.9, "min_p": 0.1},
    ]
    ways += [{"temperature": 0.3, "top_k": 9, "seed": 1}]
    costs = Costs(Runner(network_of("llama")))
    for way in ways:
        costs.of([Plan(1, SamplingParams(**way))], 1)
    named = [name.removeprefix("1 x 1/0/0") for name in costs.measured]
    assert named == ["", " sampled", " sampled top-p", " sampled top-p min-p", " sampled top-k"]
    costs = Costs(Runner(network_of("llama")))
    costs.of([Plan(1, SamplingParams(0.1, top_p=0.5))], 1)
    assert not costs.measured


def test_steps_that_are_launched_ahead_are_timed_so(monkeypatch):
    class Ahead(Runner):
        lag = 1

    class Step:
        def get(self) -> None:
            read.append(len(launched))

    launched, read = [], []
    monkeypatch.setattr(Runner, "step", lambda self, plan, rows, longest: launched.append(plan) or Step())
    costs = Costs(Ahead(network_of("llama")), remeasure=True)
    monkeypatch.setattr(costs, "_save", lambda: None)
    costs.of([Plan(1)], 1)
    assert read == [1, *(1 + REPEATS * n for n in range(1, 1 + ROUNDS))]


def test_a_batch_that_shrinks_works_nothing_out_twice(monkeypatch):
    """Sizes differ in what can pay; four runs of 64 rows that end one by one, without a draft to learn from."""
    planner, asked = planner_with({}), []
    costs = {plan_of(shape): 1.0 + 0.01 * plan_of(shape).slots for shape in SHAPES_CUDA}
    planner.costs = {
        size: [(plan, seconds) for plan, seconds in costs.items() if plan.slots * size <= 4096]
        for size in (1, 2, 4, 8, 16, 32, 64)
    }
    assert len(planner.costs[1]) > len(planner.costs[64])
    monkeypatch.setattr(
        "tidar.decode.planner.expected_tokens", lambda *given: asked.append(given) or expected_tokens(*given)
    )
    for _ in range(4):
        planner.begin()
        planner.acceptance.relax()
        for size in (64, 32, 16, 8, 4, 2, 1):
            planner.first(size)
            planner.choose(size)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "ar", "draft_length": 4}, "mode 'ar' drafts nothing"),
        ({"mode": "ar", "plan": "auto"}, "mode 'ar' drafts nothing"),
        ({"mode": "ar", "remeasure": True}, "mode 'ar' drafts nothing"),
        ({"draft_length": 4, "plan": "auto"}, "fix the plan"),
        ({"outcomes": 2, "remeasure": True}, "fix the plan"),
        ({"trust": 0.5, "plan": "auto"}, "fix the plan"),
        ({"plan": "best"}, "must be 'auto' or 'fixed'"),
        ({"plan": "fixed", "remeasure": True}, "leave it or remeasure"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message):
    options = dict(options)
    params = SamplingParams(trust=options.pop("trust", 1.0))
    with pytest.raises(TidarError, match=message):
        TidarModel(network_of("llama"), None).plan(params=params, **options)


@pytest.mark.parametrize(("step", "together", "samples"), [(0.2, 1, 2), (0.02, 5, 4), (1e-4, REPEATS, 6)])
def test_samples_of_short_steps_last_as_long_as_those_of_long_ones(step, together, samples, monkeypatch):
    """On a machine that is slow every now and then the fastest of short steps would be spared that, but no long one."""
    counts = []

    def seconds(bench, plan, count):
        counts.append(count)
        return step / 2 if count == 1 and len(counts) == 2 else step  # the first sample had luck

    monkeypatch.setattr(_Bench, "_together", seconds)
    runner = Runner(tiny_network("llama"))
    assert not runner.lag
    found = _Bench(runner, Plan(8), 1).seconds(Plan(1))
    assert found == step
    assert counts[:2] == [1, 1]  # one before, and one to see how long they take
    assert len(counts[2:]) in range(samples - 1, samples + 2)
    assert set(counts[2:]) <= {together, min(REPEATS, 2 * together)}
