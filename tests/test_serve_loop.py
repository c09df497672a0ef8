"""The batched loop: rows of different kinds side by side, each what it would be alone; places that come free."""

import queue
import threading
from dataclasses import replace

import pytest
import torch

from serving import wait_until
from tidar import TidarModel
from tidar.decode.engine import Engine, Fixed, Limits
from tidar.decode.planner import AutoPlanner
from tidar.decode.step import Plan
from tidar.sampling import SamplingParams
from tidar.serve import loop as module
from tidar.serve.loop import ClosedError, Job, Loop, QueueFullError
from tidar.serve.metrics import Metrics
from tiny import CONTEXT, PROMPTS, drafting_folder

PLAN = Plan(4, outcomes=2, alternatives=3)
KINDS = [
    SamplingParams(),
    SamplingParams(0.7, seed=1),
    SamplingParams(1.0, top_p=0.8, seed=2),
    SamplingParams(1.5, top_k=5, seed=2**63 - 1),
    SamplingParams(1.0, min_p=0.05, seed=4),
    SamplingParams(seed=9),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TidarModel:
    folder = drafting_folder(tmp_path_factory.mktemp("drafting"))
    return TidarModel.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture
def started(model):
    loops = []

    def start(plan=PLAN, rows=4, waiting=100, **options) -> Loop:
        planner = Fixed(plan) if isinstance(plan, Plan) else plan
        loop = Loop(
            model.network,
            model.tokenizer,
            planner,
            rows=rows,
            waiting=waiting,
            context=CONTEXT,
            metrics=Metrics(),
            **options,
        )
        loops.append(loop)
        loop.start()
        return loop

    yield start
    for loop in loops:
        loop.stop()


class Wanted:
    """A job, and what was delivered for it."""

    def __init__(self, prompt, params=KINDS[0], new=20, **options):
        self.pieces = queue.Queue()
        self.job = Job(prompt, Limits(new), params, self.pieces.put, **options)

    def wait(self):
        """All pieces; the last one says that it is the last."""
        pieces = []
        while not pieces or (pieces[-1].finish_reason is None and not pieces[-1].failed):
            pieces.append(self.pieces.get(timeout=30))
        assert self.pieces.empty()
        return pieces

    def tokens(self):
        return [token for piece in self.wait() for token in piece.token_ids]


def alone(model, prompt, params, plan=PLAN, new=20, row=0):
    """What the engine answers to a prompt that is row `row` of a job."""
    prompts = [[1]] * row + [prompt]
    updates = [u for us in Engine(model.network, replace(plan, params=params)).run(prompts, Limits(new)) for u in us]
    return [token for u in updates if u.answer.row == row for token in u.token_ids]


@pytest.mark.parametrize("rows", [2, 8])
def test_a_row_is_what_the_engine_answers_whatever_runs_beside_it(model, started, rows):
    loop = started(rows=rows)
    jobs = [Wanted(prompt, params) for prompt in PROMPTS for params in KINDS]
    for wanted in jobs:
        loop.submit([wanted.job])
    for wanted in jobs:
        assert wanted.tokens() == alone(model, wanted.job.prompt, wanted.job.params)


def test_choices_of_one_seed_are_the_rows_of_one_job(model, started):
    params = SamplingParams(1.0, seed=7)
    jobs = [Wanted(PROMPTS[0], params, choice=choice) for choice in range(3)]
    started().submit([wanted.job for wanted in jobs])
    answers = [wanted.tokens() for wanted in jobs]
    assert answers == [alone(model, PROMPTS[0], params, row=row) for row in range(3)]
    assert len({tuple(answer) for answer in answers}) == 3


@pytest.mark.parametrize("params", KINDS[:3])
def test_a_row_without_drafts_is_plain_decoding_whatever_is_drafted_beside_it(model, started, params):
    loop = started()
    others = [Wanted(prompt, kind, new=40) for prompt, kind in zip(PROMPTS, KINDS, strict=False)]
    plain = [Wanted(prompt, params, drafting=False) for prompt in PROMPTS]
    for pair in zip(others, plain, strict=True):
        loop.submit([wanted.job for wanted in pair])
    for wanted in plain:
        pieces = wanted.wait()
        assert [len(piece.token_ids) for piece in pieces] == [1] * 20
        tokens = [token for piece in pieces for token in piece.token_ids]
        assert tokens == alone(model, wanted.job.prompt, params, Plan(1))


def test_seeds_count_even_where_the_planner_learns(model, started):
    loop = started(AutoPlanner(SamplingParams()), rows=1)
    sampled = KINDS[1]
    assert [loop.drafts_for(params, True) for params in (KINDS[0], sampled)] == [True, False]
    assert loop.drafts_for(sampled, seeded=False)
    for _ in range(2):
        wanted = Wanted(PROMPTS[0], sampled, drafting=loop.drafts_for(sampled, True))
        loop.submit([wanted.job])
        assert wanted.tokens() == alone(model, PROMPTS[0], sampled, Plan(1))


def test_logprobs_are_the_models_own(model, started):
    """Log-softmax of the plain causal LM, for greedy and sampled rows, drafted or not; as many beside it as asked."""
    loop = started()
    jobs = [Wanted(PROMPTS[0], params, logprobs=n, drafting=bool(n % 2)) for n, params in enumerate(KINDS)]
    jobs.append(Wanted(PROMPTS[2]))
    for wanted in jobs:
        loop.submit([wanted.job])
    for wanted in jobs:
        pieces = wanted.wait()
        tokens = [token for piece in pieces for token in piece.token_ids]
        said = [logprob for piece in pieces for logprob in piece.logprobs]
        if wanted.job.logprobs is None:
            assert said == []
            continue
        ids = torch.tensor([wanted.job.prompt + tokens])
        true = model.hf_model(ids[:, :-1], attention_mask=None).logits[0, len(wanted.job.prompt) - 1 :].log_softmax(-1)
        own = [true[place, token].item() for place, token in enumerate(tokens)]
        assert [one.chosen for one in said] == pytest.approx(own, abs=1e-4)
        for place, one in enumerate(said):
            values, likeliest = true[place].topk(max(1, wanted.job.logprobs))
            assert [token for token, _ in one.likeliest] == likeliest.tolist()[: wanted.job.logprobs]
            assert [value for _, value in one.likeliest] == pytest.approx(
                values.tolist()[: wanted.job.logprobs], abs=1e-4
            )


def test_a_cancelled_row_is_free_at_the_next_forward(started):
    loop = started(rows=1)
    long, short = Wanted(PROMPTS[0], new=100), Wanted(PROMPTS[1], new=3)
    loop.submit([long.job])
    first = long.pieces.get(timeout=30)
    loop.submit([short.job])
    loop.cancel([long.job])
    assert len(short.tokens()) == 3
    assert len(first.answer.token_ids) < 100
    assert loop.metrics.ended.labels("cancelled")._value.get() == 1


def test_waiting_jobs_can_be_cancelled(started):
    loop = started(rows=1)
    jobs = [Wanted(PROMPTS[0], new=50) for _ in range(5)]
    loop.submit([wanted.job for wanted in jobs])
    loop.cancel([wanted.job for wanted in jobs[1:]])
    assert loop.queued <= 1  # the first may not have got its place yet
    assert len(jobs[0].tokens()) == 50
    assert all(wanted.pieces.empty() for wanted in jobs[1:])


def test_the_queue_takes_all_jobs_of_a_request_or_none(started, monkeypatch):
    held = threading.Event()
    loop = started(rows=1, waiting=2)
    monkeypatch.setattr(loop, "_turn", held.wait)
    loop.submit([Wanted([1]).job] * 2)
    with pytest.raises(QueueFullError):
        loop.submit([Wanted([1]).job] * 2)
    assert loop.queued == 2
    loop.submit([Wanted([1]).job])
    monkeypatch.undo()
    held.set()


def test_a_failure_ends_what_ran_and_nothing_else(started, monkeypatch):
    loop = started(rows=2)
    admit, failing = loop.runner.admit, [True]

    def admits(*args):
        if failing.pop() if failing else False:
            raise RuntimeError("out of memory")
        return admit(*args)

    monkeypatch.setattr(loop.runner, "admit", admits)
    lost = [Wanted(prompt) for prompt in PROMPTS]
    loop.submit([wanted.job for wanted in lost])
    assert all("its log says why" in wanted.wait()[0].failed for wanted in lost)
    after = Wanted(PROMPTS[0])
    loop.submit([after.job])
    assert len(after.tokens()) == 20


def test_a_loop_that_cannot_go_on_says_so(started, monkeypatch):
    loop = started(rows=1)

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop.runner, "admit", fail)
    monkeypatch.setattr(loop.runner, "prepare", fail)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    lost = Wanted(PROMPTS[0])
    loop.submit([lost.job])
    assert lost.wait()[-1].failed
    wait_until(lambda: not loop.open)
    with pytest.raises(ClosedError):
        loop.submit([lost.job])


def test_a_loop_can_start_again(started):
    loop = started(rows=1)
    loop.stop()
    loop.start()
    after = Wanted(PROMPTS[0])
    loop.submit([after.job])
    assert len(after.tokens()) == 20


def test_stopping_tells_everybody(started):
    loop = started(rows=1)
    jobs = [Wanted(PROMPTS[0], new=100) for _ in range(3)]
    loop.submit([wanted.job for wanted in jobs])
    loop.stop()
    assert all(wanted.wait()[-1].failed for wanted in jobs)
    with pytest.raises(ClosedError):
        loop.submit([jobs[0].job])


def test_long_prompts_are_prefilled_apart(started, monkeypatch):
    monkeypatch.setattr(module, "PREFILL_TOKENS", 20)
    loop = started(rows=8)
    jobs = [Wanted(prompt, new=1) for prompt in PROMPTS]  # of 6, 1, 17, 2 and 9 tokens
    loop.submit([wanted.job for wanted in jobs])
    assert all(len(wanted.tokens()) == 1 for wanted in jobs)
    wait_until(lambda: loop.running == 0)
    assert loop.metrics.forwards.labels("prefill")._value.get() == 3
