"""What captured graphs are asked to do, with stand-ins that run the same functions on the CPU."""

import math
from collections.abc import Iterator
from queue import Queue

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tidar.bench import slots
from tidar.decode import runner as module
from tidar.decode.cache import RowCache
from tidar.decode.engine import Engine, Fixed, Limits
from tidar.decode.planner import AutoPlanner
from tidar.decode.runner import CAPACITY, LONGEST, MOST_SLOTS, GraphRunner, Runner, cut
from tidar.decode.step import Plan, State, pack_prompts, prefill, prefill_rows, step
from tidar.sampling import MixedParams, SamplingParams
from tidar.serve.loop import Job, Loop
from tidar.serve.metrics import Metrics
from tiny import CONTEXT, PROMPTS, continuations, network_of, tiny_network

SAMPLED = SamplingParams(temperature=0.8, seed=3)


@pytest.fixture(autouse=True)
def everything_is_captured_at_once(monkeypatch):
    monkeypatch.setattr(GraphRunner, "patient", False)


class Replayed(GraphRunner):
    """Its graphs run what they would have captured."""

    def __init__(self, network) -> None:
        super().__init__(network)
        self.made = list[str]()

    def record(self, work, what):
        self.made.append(what)
        result = work()

        class Graph:
            def replay(self) -> None:
                result.copy_(work())

        return Graph(), result


class Copied(module.Pending):
    """As on a GPU, the next replay does not change it."""

    def __init__(self, packed: torch.Tensor, *others: object) -> None:
        super().__init__(packed.clone(), *others)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(module, "Pending", Copied)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def tensors(state: State) -> Iterator[torch.Tensor]:
    yield from (state.cache.lengths, *state.tensors())
    for row, length in enumerate(state.cache.lengths.tolist()):
        yield from (store[row, :, :length] for store in (*state.cache.keys, *state.cache.values))


def assert_same(state: State, wanted: State) -> None:
    for mine, theirs in zip(tensors(state), tensors(wanted), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gpt_bigcode"])
@pytest.mark.parametrize("plan", [Plan(1), Plan(4), Plan(4, SAMPLED)])
def test_padding_changes_nothing_in_the_state_of_a_prefill(arch, plan):
    wanted = prefill(network_of(arch), PROMPTS, [4, 3, 2, 1, 0], plan)
    packed = pack_prompts(PROMPTS, [4, 3, 2, 1, 0], plan.params.seed, CONTEXT + 20)
    assert_same(prefill_rows(network_of(arch), packed, plan), wanted)


class AskNothing(TorchDispatchMode):
    """Refuses what a captured graph cannot do: read a value back, or bring one from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else ()
        counted = any(index is not None and index.dtype == torch.bool for index in indices)
        if counted or name in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal", "masked_select"):
            raise AssertionError(f"a captured prefill calls {name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "plan",
    [Plan(1), Plan(4), Plan(4, outcomes=2, alternatives=5), Plan(4, SAMPLED, 3, 4), Plan(4, SamplingParams(trust=0.5))],
)
def test_prefill_and_admission_ask_the_device_nothing(plan, fused, monkeypatch):
    network = tiny_network("llama")
    if fused:
        network.fused = network.build_fused()
    monkeypatch.setattr(RowCache, "get_seq_length", lambda *_: pytest.fail("reads a length back"))
    packed, places = pack_prompts(PROMPTS[:2], [0, 1], 0, 24), torch.tensor([1, 0])
    state = State.empty(2, 128, plan.draft_length, network, not plan.params.greedy)
    state.put_rows(places, prefill_rows(network, packed, plan))
    step(network, state, plan)  # makes what is kept between steps, as before a capture
    with torch.inference_mode(), AskNothing():
        state.put_rows(places, prefill_rows(network, packed, plan))
        step(network, state, plan)


def test_the_watch_of_that_test_sees_what_it_should():
    for ask in (lambda: torch.ones(1).item(), lambda: torch.tensor([1, 2]), lambda: torch.ones(2)[torch.ones(2) > 0]):
        with pytest.raises(AssertionError, match="captured"), AskNothing():
            ask()


@given(st.lists(st.integers(1, LONGEST), max_size=40))
def test_pieces_are_few_sizes_that_hold_their_prompts(slots):
    seen = []
    for piece, width in cut(slots):
        rows = slots[piece]
        seen += rows
        assert len(rows) & (len(rows) - 1) == width & (width - 1) == 0
        assert max(rows) <= width < 2 * max(max(rows), 64)
        assert len(rows) * width <= MOST_SLOTS
    assert seen == slots


@pytest.mark.parametrize("plan", [Plan(1), Plan(4), Plan(4, SAMPLED)])
def test_an_admission_puts_what_a_prefill_gives_in_its_places(plan):
    """Twice the same sizes, so that the second time a graph with other inputs is replayed."""
    network, places = network_of("llama"), [6, 0, 3]
    mine, eager = Replayed(network), module.Runner(network)
    for runner in (mine, eager):
        runner.prepare(8, 100, plan)
    for rows in ([0, 1, 2], [2, 3, 4]):
        prompts = [PROMPTS[row] for row in rows]
        assert mine.admit(prompts, rows, places, plan).tokens() == eager.admit(prompts, rows, places, plan).tokens()
        assert mine.state.active.tolist() == [place in places for place in range(8)]
        for place in places:
            one, other = ([t[place] for t in runner.state.tensors()] for runner in (mine, eager))
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert mine.state.cache.lengths.tolist() == eager.state.cache.lengths.tolist()
    assert len(mine.graphs) == 2  # two rows, and one


def test_work_that_hides_its_launches_and_long_prompts_are_not_captured(monkeypatch):
    runner, plan = Replayed(network_of("llama")), Plan(4)
    runner.prepare(2, CONTEXT, plan)
    for name, value in (("PREFILL_WORK", 0), ("LONGEST", 32)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert runner.admit(PROMPTS[:1], [0], [0], plan).tokens() == continuations("llama")[0][:1]
        assert not runner.graphs
    runner.admit(PROMPTS[:1], [0], [0], plan)
    assert len(runner.graphs) == 1


def decode(network, planner, rows, batch_size, new=20):
    prompts, answers = [PROMPTS[row] for row in rows], {}
    for updates in Engine(network, planner).run(prompts, Limits(new), batch_size):
        answers.update({u.answer.row: u.answer.token_ids for u in updates})
    return [answers[i] for i in range(len(rows))]


@settings(max_examples=15)
@given(st.data())
def test_greedy_output_is_that_of_generate_with_graphs(data):
    """Refills, compaction, batches that are no powers of two, and a runner that is kept between runs."""
    network = tiny_network("llama")
    runner = Replayed(network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tidar.decode.engine.runner_for", lambda network: runner)
        patch.setattr(module, "SHRINK_SLOTS", data.draw(st.integers(0, 100)))
        runner.patient = data.draw(st.booleans())
        for _ in range(2):
            rows = data.draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=9))
            plan = data.draw(st.sampled_from([Plan(1), Plan(4), Plan(8, outcomes=2)]))
            got = decode(network, plan, rows, data.draw(st.integers(1, 8)))
            assert got == [continuations("llama")[row][:20] for row in rows]


def test_samples_are_those_of_the_eager_runner_and_a_new_seed_needs_no_new_graph(monkeypatch):
    network = tiny_network("llama")
    runner = Replayed(network)
    plans = [Plan(4, SamplingParams(temperature=0.8, seed=seed)) for seed in (3, 4)]
    eager = [decode(network, plan, [0, 1, 2, 3, 4, 0], 3) for plan in plans]
    monkeypatch.setattr("tidar.decode.engine.runner_for", lambda network: runner)
    graphs = []
    for plan, wanted in zip(plans, eager, strict=True):
        assert decode(network, plan, [0, 1, 2, 3, 4, 0], 3) == wanted
        graphs.append({key[0] for key in runner.graphs})  # of which plans; sizes depend on which row ends when
    assert eager[0] != eager[1]
    assert graphs[0] == graphs[1]


def test_greedy_and_sampled_runs_in_turn_forget_no_graph(monkeypatch):
    """Greedy steps over a state that can be sampled keep no probabilities."""
    network = tiny_network("llama")
    plans = [Plan(4), Plan(4, SAMPLED)]
    wanted = [decode(network, plan, [0, 1, 2], 3) for plan in plans]
    runner = Replayed(network)
    monkeypatch.setattr("tidar.decode.engine.runner_for", lambda network: runner)
    made = list[int]()
    for _ in range(3):
        for plan, tokens in zip(plans, wanted, strict=True):
            assert decode(network, plan, [0, 1, 2], 3) == tokens
        made.append(len(runner.made))
    assert made[1] == made[2]
    probabilities = runner.state.draft_probs.probs.clone()
    assert decode(network, plans[0], [0, 1, 2], 3) == wanted[0]
    assert runner.state.draft_probs.probs.equal(probabilities)
    runner.prepare(3, runner.state.cache.capacity + 1, plans[0])
    assert runner.state.draft_probs is not None  # a larger one can do what the old one could


@pytest.mark.parametrize("most", [1, 2, 7])
@pytest.mark.parametrize("plan", [Plan(1), Plan(4)])
def test_no_forward_is_launched_for_tokens_that_are_on_their_way(most, plan, monkeypatch):
    """Of plain decoding that is known: the prefill's token, and one a forward."""
    network, launched = tiny_network("llama"), []
    runner = Replayed(network)
    monkeypatch.setattr("tidar.decode.engine.runner_for", lambda network: runner)
    own = runner.step
    runner.step = lambda *given: launched.append(given) or own(*given)
    answers = {}
    for updates in Engine(network, plan).run(PROMPTS[:3], Limits(most), 3):
        answers.update({u.answer.row: u.answer for u in updates})
    assert [answers[row].token_ids for row in range(3)] == [c[:most] for c in continuations("llama")[:3]]
    needed = max(answer.forwards for answer in answers.values()) - 1
    assert len(launched) == needed if not plan.drafting else needed <= len(launched) <= min(most - 1, needed + 1)


def test_the_first_token_does_not_wait_until_a_step_is_captured(monkeypatch):
    network = tiny_network("llama")
    runner = Replayed(network)
    monkeypatch.setattr("tidar.decode.engine.runner_for", lambda network: runner)
    for captured in (False, True):
        run = Engine(network, Plan(4)).run(PROMPTS[:1], Limits(9))
        assert len(next(run)[0].answer.token_ids) == 1
        assert any("step" in what for what in runner.made) == captured
        list(run)


def test_what_was_captured_while_measuring_is_what_the_run_replays(monkeypatch):
    network = tiny_network("llama")
    runner = Replayed(network)
    monkeypatch.setattr("tidar.decode.engine.runner_for", lambda network: runner)
    decode(network, AutoPlanner(SamplingParams(), remeasure=True), [0, 1, 2], 3)
    assert len(runner.made) == len(runner.graphs)  # none was forgotten
    assert {rows for _, rows in (key for key in runner.graphs if len(key) == 2)} == {1, 2, 4}


def test_a_step_is_ready_once_it_is_captured():
    runner, plan = Replayed(network_of("llama")), Plan(4)
    runner.prepare(2, 100, plan)
    assert not runner.ready(plan, 2)
    runner.step(plan, 2, 0)
    assert runner.ready(Plan(4, SamplingParams(seed=1)), 2)
    assert not runner.ready(plan, 1)
    assert module.Runner(network_of("llama")).ready(plan, 2)


def test_the_graph_that_was_not_used_for_longest_makes_room(monkeypatch):
    monkeypatch.setattr(module, "MOST_GRAPHS", 2)
    runner = Replayed(network_of("llama"))
    runner.prepare(1, 100, Plan(4))
    for length in (1, 2, 1, 3, 1, 2):
        runner.step(Plan(length), 1, 0)
    assert [what.split()[3] for what in runner.made] == ["1", "6", "12", "6"]


def test_a_state_is_replaced_only_by_one_that_can_do_more():
    runner, plan = Replayed(tiny_network("llama")), Plan(4)
    runner.network.lm.config.max_position_embeddings = 100_000
    first = runner.prepare(8, CAPACITY - 100, plan)
    assert first.cache.capacity == CAPACITY
    for rows, capacity in ((8, CAPACITY), (1, 10), (2, 500)):
        assert runner.prepare(rows, capacity, plan) is first
    runner.step(plan, 8, 0)

    def size(rows, capacity):
        state = runner.prepare(rows, capacity, plan)
        return len(state.drafts), state.cache.capacity

    assert size(2, CAPACITY + 1) == (8, 2 * CAPACITY)  # as many rows as before
    assert not runner.graphs
    assert size(2, 8 * CAPACITY + 1) == (2, 16 * CAPACITY)  # which would now be four times the memory
    assert size(4, 9) == (4, 16 * CAPACITY)


def test_room_does_not_grow_past_the_context():
    runner = Replayed(network_of("llama"))
    assert runner.prepare(1, CAPACITY + 1, Plan(4)).cache.capacity == CONTEXT + CAPACITY


def test_a_server_replays_what_lasts_and_runs_the_rest(monkeypatch):
    """Greedy and mixed batches, rows that come and go: each row is what the engine answers, and greedy steps replay."""
    network = network_of("llama")
    replayed = Replayed(network)
    monkeypatch.setattr("tidar.serve.loop.runner_for", lambda network: replayed)
    loop = Loop(network, None, Fixed(Plan(4)), rows=3, waiting=99, context=CONTEXT, metrics=Metrics())  # type: ignore[arg-type]
    answers = list[tuple[Job, Queue]]()
    kinds = [*[SamplingParams()] * 5, SAMPLED, SamplingParams(), SamplingParams(1.0, top_k=9, seed=1), SAMPLED, SAMPLED]
    for params, prompt in zip(kinds, PROMPTS * 2, strict=True):
        pieces = Queue()
        answers.append((Job(prompt, Limits(20), params, pieces.put, logprobs=1 if params.top_k else None), pieces))
    loop.start()
    loop.submit([job for job, _ in answers])
    said = list[list[int]]()
    for _, pieces in answers:
        tokens, reason = [], None
        while reason is None:
            piece = pieces.get(timeout=30)
            assert not piece.failed
            tokens, reason = tokens + piece.token_ids, piece.finish_reason
        said.append(tokens)
    loop.stop()  # before anybody else decodes with its network
    for (job, _), tokens in zip(answers, said, strict=True):
        alone = Engine(network, Plan(4, job.params), runner=Runner(network)).run([job.prompt], Limits(20))
        assert tokens == [token for [update] in alone for token in update.token_ids]
    assert any("a step of 20 slots x 4 rows" in made for made in replayed.made)
    assert all(not isinstance(key[0].params, MixedParams) and key[0].logprobs is None for key in replayed.graphs)


def test_sizes_of_prefills_that_are_rare_run_eagerly(monkeypatch):
    monkeypatch.setattr(module, "PREFILL_USES", 2)
    runner, plan = Replayed(network_of("llama")), Plan(4)
    runner.patient = True
    runner.prepare(2, CONTEXT, plan)
    captured = []
    for _ in range(4):
        assert runner.admit(PROMPTS[:1], [0], [0], plan).tokens() == continuations("llama")[0][:1]
        captured.append(len(runner.graphs))
    assert captured == [0, 0, 1, 1]
    runner.admit(PROMPTS[:2], [0, 1], [0, 1], plan)  # another size
    assert len(runner.graphs) == 1


@settings(max_examples=15)
@given(st.data())
def test_prefills_of_rare_sizes_run_by_graphs_of_others(data):
    """Tokens and places are those of the eager runner, whatever graphs there are to choose from."""
    network, plan = network_of("llama"), data.draw(st.sampled_from([Plan(1), Plan(4)]))
    mine, eager = Replayed(network), module.Runner(network)
    for runner in (mine, eager):
        runner.prepare(8, 4 * CONTEXT, plan)
    for rows in data.draw(st.lists(st.integers(1, 4), max_size=3)):
        mine.admit([PROMPTS[2] * data.draw(st.integers(1, 6))] * rows, list(range(rows)), list(range(rows)), plan)
    mine.patient, known = True, dict(mine.graphs)
    rows = data.draw(st.integers(1, 8))
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(rows)]
    places = data.draw(st.permutations(range(8)))[:rows]
    ids = list(range(rows))
    assert mine.admit(prompts, ids, places, plan).tokens() == eager.admit(prompts, ids, places, plan).tokens()
    assert mine.graphs.keys() == known.keys()
    for place in places:
        one, other = ([t[place] for t in runner.state.tensors()] for runner in (mine, eager))
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_size_that_others_stand_in_for_is_captured_later(monkeypatch):
    monkeypatch.setattr(module, "STAND_IN_USES", 2)
    monkeypatch.setattr(module, "PREFILL_USES", 3)
    runner, plan = Replayed(network_of("llama")), Plan(1)
    runner.prepare(4, CONTEXT, plan)
    runner.admit(PROMPTS[:1], [0], [0], plan)  # captured at once
    runner.patient, replays = True, []
    monkeypatch.setattr(runner, "_admit", lambda *args, own=runner._admit: replays.append(args[4][1:]) or own(*args))
    slots = module.bucket(max(map(len, PROMPTS[:2])))
    for _ in range(7):
        said = runner.admit(PROMPTS[:2], [0, 1], [1, 0], plan).tokens()
        assert said == [continuations("llama")[row][0] for row in (0, 1)]
    assert replays == [(1, slots)] * 12 + [(2, slots)]


def test_a_benchmark_captures_every_size_at_once(monkeypatch):
    monkeypatch.setattr(GraphRunner, "patient", True)
    network = tiny_network("llama")
    runner = Replayed(network)
    monkeypatch.setattr(module, "runner_for", lambda network: runner)
    runner.prepare(2, CONTEXT, Plan(4))
    with module.captured_at_once(network):
        runner.admit(PROMPTS[:1], [0], [0], Plan(4))
    assert len(runner.graphs) == 1
    runner.admit(PROMPTS[:2], [0, 1], [0, 1], Plan(4))
    assert len(runner.graphs) == 1


def test_a_batch_shrinks_once_that_is_worth_a_capture(monkeypatch):
    plan = Plan(4)
    monkeypatch.setattr(module, "SHRINK_SLOTS", 2 * 6 * (plan.slots + module.SHRINK_ROW))
    runner = Replayed(network_of("llama"))
    runner.patient = True
    runner.prepare(4, CONTEXT, plan)
    plain = math.ceil(module.SHRINK_SLOTS / (2 * (1 + module.SHRINK_ROW)))
    for one, places, uses in ((plan, 8, 2), (plan, 4, 6), (Plan(1), 4, plain)):
        assert [runner.shrinks(one, places, 2) for _ in range(uses + 1)] == [False] * uses + [True]
    # Of 12 places' worth 4, 6 and 2 are saved by other sizes.
    assert [runner.shrinks(plan, places, 2) for places in (6, 8, 4, 4)] == [False] * 3 + [True]
    runner.step(plan, 1, 0)
    assert runner.shrinks(plan, 2, 1)  # captured


def test_a_batch_shrinks_to_the_smallest_size_that_is_captured(monkeypatch):
    """Five rows begin in eight places, and in the end there is one."""
    network, sizes = tiny_network("llama"), []
    runner, plan = Replayed(network), Plan(1)
    runner.prepare(8, 4 * CONTEXT, plan)
    runner.step(plan, 4, 0)
    monkeypatch.setattr(runner, "step", lambda *given, own=runner.step: sizes.append(given[1]) or own(*given))
    wanted = continuations("llama")
    ends = frozenset(row[3] for row in wanted[1:]) - {*wanted[0][:20]}
    for runner.patient, needed in ((True, [8, 4]), (False, [8, 4, 2])):
        answers = {}
        for updates in Engine(network, plan, runner=runner).run(PROMPTS, Limits(20, ends)):
            answers.update({u.answer.row: u.answer.token_ids for u in updates})
        assert all(answer == wanted[row][: len(answer)] for row, answer in answers.items())
        assert list(dict.fromkeys(sizes))[: len(needed)] == needed
        assert needed[-1] == min(sizes) or not runner.patient
        sizes.clear()


def test_a_batch_that_may_not_shrink_goes_on_at_its_size(monkeypatch):
    network, sizes, answers = tiny_network("llama"), [], {}
    runner = Replayed(network)
    runner.patient = True
    monkeypatch.setattr(runner, "step", lambda *given, own=runner.step: sizes.append(given[1]) or own(*given))
    wanted = continuations("llama")
    ends = frozenset(wanted[1][3:4]) - {*wanted[0][:20]}  # of the second answer, not of the first
    assert ends
    for least in (module.SHRINK_SLOTS, 0):
        monkeypatch.setattr(module, "SHRINK_SLOTS", least)
        sizes.clear()
        for updates in Engine(network, Plan(1), runner=runner).run(PROMPTS[:2], Limits(20, ends)):
            answers.update({u.answer.row: u.answer.token_ids for u in updates})
        assert answers == {0: wanted[0][:20], 1: wanted[1][: 1 + wanted[1].index(min(ends))]}
        assert set(sizes) == ({2} if least else {2, 1})


def test_a_forward_is_timed_as_a_graph_of_the_runner(monkeypatch):
    network = network_of("llama")
    runner = Replayed(network)
    monkeypatch.setattr(slots, "runner_for", lambda network: runner)
    timed = slots.time_forward(network, 4, 8, 2)
    assert runner.made == ["a forward of 4 tokens x 2 rows"]
    assert timed.warm_up > timed.seconds > 0
