"""One server: parity with plain decoding by vLLM on the same weights; nothing lost, doubled or leaked on the way."""

import random

import pytest
import torch
from cases import EDGE, PROCESSED, PROMPTS, TIDAR, count, oracle
from engines import GREEDY, Rerun, answers, core, engine, free_blocks, runner
from vllm import SamplingParams

from tidar.vllm import metrics


@pytest.fixture(scope="module")
def served(checkpoint, plain):
    with engine(checkpoint, TIDAR) as llm:
        yield llm


def test_greedy_parity_and_the_curve(served, plain):
    for requests, drafting in ((7, False), (5, True), (3, True), (1, True)):
        steps = count(metrics.STEPS)
        assert answers(served, PROMPTS[:requests], 60) == plain["greedy"][:requests]
        assert (count(metrics.STEPS) > steps) == drafting


def test_parity_where_most_drafts_stand(served, plain):
    steps, tokens, misses = (count(c) for c in (metrics.STEPS, metrics.TOKENS, metrics.MISSES))
    with oracle(plain).instead(served):
        for batch in (PROMPTS[:1], PROMPTS[:3], PROMPTS[1:6]):
            expected = [plain["greedy"][PROMPTS.index(prompt)] for prompt in batch]
            assert answers(served, batch, 60) == expected
    assert count(metrics.TOKENS) - tokens > 2 * (count(metrics.STEPS) - steps)
    assert count(metrics.MISSES) > misses


def test_parity_of_recorded_steps(served, plain, monkeypatch):
    """As on a GPU, where parts of a step are graphs; answers end one by one, so the number of requests changes."""
    state, replay = runner(served).model_state, Rerun()
    monkeypatch.setattr(state, "verdicts", replay)
    monkeypatch.setattr(state.maker, "replay", replay)
    with oracle(plain).instead(served):
        for batch in (PROMPTS[:3], PROMPTS[1:6], PROMPTS[:1]):
            expected = [plain["greedy"][PROMPTS.index(prompt)] for prompt in batch]
            assert answers(served, batch, 60) == expected
    assert {kind for kind, *_ in replay.recorded} == {"inputs", "verdict"}
    assert len({requests for _, _, requests in replay.recorded}) > 1
    assert replay.replays > 3 * len(replay.recorded)
    for recorded in replay.recorded.values():
        recorded.fixed = tuple(address + 1 for address in recorded.fixed)  # the batch lies elsewhere
    assert answers(served, PROMPTS[:3], 60) == plain["greedy"][:3]


def test_large_steps_are_judged_in_parts(served, plain, monkeypatch):
    judged, drafted = [], {}
    head = runner(served).model_state.head
    for most in (10_000, 8, 1):
        seen = drafted[most] = []
        with monkeypatch.context() as patch:
            patch.setattr("tidar.vllm.sampler.MOST_JUDGED", most)
            draft = head.drafts

            def drafts(block, logits, first, draft=draft, seen=seen):
                seen.append(draft(block, logits, first))
                return seen[-1]

            patch.setattr(head, "drafts", drafts)
            judged.append([answers(served, PROMPTS[:3], 40), answers(served, PROMPTS[:3], 40, **PROCESSED[0])])
    assert judged[0] == judged[1] == judged[2]
    assert judged[0][0] == [answer[:40] for answer in plain["greedy"][:3]]
    together, in_pairs, one_by_one = (torch.cat([d.drafts for d in drafted[most]]) for most in drafted)
    assert torch.equal(together, in_pairs)
    assert torch.equal(together, one_by_one)
    assert max(len(d.drafts) for d in drafted[8]) == 2
    assert max(len(d.drafts) for d in drafted[1]) == 1


def test_warm_up_is_not_counted(served, plain):
    asked, got = SamplingParams(max_tokens=60, **GREEDY), {}
    for name, counted in (("_warmup_0_", False), ("_v2_mixed_warmup_decode_", False), ("warm", True)):
        steps = count(metrics.STEPS)
        served.llm_engine.add_request(name, {"prompt_token_ids": PROMPTS[0]}, asked)
        while served.llm_engine.has_unfinished_requests():
            got |= {output.request_id: output.outputs[0].token_ids for output in served.llm_engine.step()}
        assert list(got[name]) == plain["greedy"][0]
        assert (count(metrics.STEPS) > steps) == counted


def test_processed_logits(served, plain):
    steps = count(metrics.STEPS)
    assert [answers(served, PROMPTS[:2], **params) for params in PROCESSED] == plain["processed"]
    assert count(metrics.STEPS) > steps


def test_context_edge(served, plain):
    assert answers(served, EDGE, 100) == plain["edge"]
    assert [len(answer) for answer in plain["edge"]] == [1, 2, 5, 12, 30]


@pytest.mark.parametrize("long", [1, 10_000])
def test_drafting_beside_prompts(served, plain, monkeypatch, long):
    """A request joins every fourth step; beside long prompts nothing drafts, beside short ones it does."""
    monkeypatch.setattr("tidar.vllm.scheduler.LONG_PROMPTS", long)
    state, engine, beside, got = runner(served).model_state, served.llm_engine, [], {}
    prepare = state.prepare_inputs

    def prepare_inputs(batch, states):
        if batch.is_prefilling_np.any() and batch.num_reqs > 1:
            beside.append(state.step is not None)
        return prepare(batch, states)

    monkeypatch.setattr(state, "prepare_inputs", prepare_inputs)
    asked, waiting, steps = SamplingParams(max_tokens=60, **GREEDY), list(range(4)), 0
    while waiting or engine.has_unfinished_requests():
        if waiting and steps % 4 == 0:
            row = waiting.pop(0)
            engine.add_request(f"beside-{long}-{row}", {"prompt_token_ids": PROMPTS[row]}, asked)
        for output in engine.step():
            if output.finished:
                got[int(output.request_id[-1])] = list(output.outputs[0].token_ids)
        steps += 1
    assert [got[row] for row in range(4)] == plain["greedy"][:4]
    assert beside
    assert all(drafted == (long > 1) for drafted in beside)


def test_switch_and_plain_neighbours(served, plain):
    steps = count(metrics.STEPS)
    off = answers(served, PROMPTS, 60, extra_args={"tidar": False})
    assert off == plain["greedy"]
    assert count(metrics.STEPS) == steps
    kinds = [{}, {"extra_args": {"tidar": 0}}, {"logprobs": 2}]
    asked = [
        SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, detokenize=False, **kind) for kind in kinds
    ]
    outputs = served.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS[:3]], asked, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == plain["greedy"][:3]
    assert count(metrics.STEPS) > steps
    told = outputs[2].outputs[0].logprobs
    assert len(told) == 60
    assert all(token in entry for token, entry in zip(plain["greedy"][2], told, strict=True))


def test_seeds_repeat(served):
    params = {"temperature": 1.0, "seed": 7}
    first = answers(served, PROMPTS[:2], 40, **params)
    assert (
        first == answers(served, PROMPTS[:2], 40, **params) != answers(served, PROMPTS[:2], 40, temperature=1.0, seed=8)
    )


def test_cancellations_leak_nothing(served, plain):
    """Fifty requests in random order, half of them cancelled while they run."""
    chance, start = random.Random(0), free_blocks(served)
    llm_engine, got, cancelled = served.llm_engine, dict[str, list[int]](), set[str]()
    for number in range(50):
        prompt = PROMPTS[number % len(PROMPTS)]
        params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, detokenize=False)
        llm_engine.add_request(f"r{number}", {"prompt_token_ids": prompt}, params)
    with oracle(plain).instead(served):
        while llm_engine.has_unfinished_requests():
            for output in llm_engine.step():
                got[output.request_id] = list(output.outputs[0].token_ids)
            if len(cancelled) < 25 and chance.random() < 0.7:
                victim = f"r{chance.randrange(50)}"
                cancelled.add(victim)
                llm_engine.abort_request([victim])
    for number in range(50):
        answer, expected = got.get(f"r{number}", []), plain["greedy"][number % len(PROMPTS)]
        assert answer == expected if f"r{number}" not in cancelled else answer == expected[: len(answer)]
    assert free_blocks(served) == start
    assert not core(served).scheduler.running
    assert not core(served).scheduler.waiting
