"""Parity with plain decoding by vLLM on the same weights, and nothing lost, doubled or leaked on the way."""

import random
from collections import Counter

import pytest
import torch
from engines import Oracle, answers, core, engine, free_blocks
from models import CONTEXT, some_prompt, tiny_checkpoint
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from tidar import sampling
from tidar.vllm import Options, metrics

PROMPTS = [some_prompt(length, seed) for seed, length in enumerate((5, 1, 40, 2, 17, 33, 64))]
TIDAR = Options(cuda=False, max_num_seqs=8, curve=((3, 4, 3), (6, 4, 1)))
"""Three shapes: up to three requests, up to six, plain decoding beyond."""
PROCESSED = (
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"logit_bias": {7: 4.0}, "allowed_token_ids": list(range(100))},
    {"min_tokens": 5, "stop_token_ids": list(range(0, 256, 3))},
)


def count(counter):
    return counter._value.get()


@pytest.fixture(scope="module")
def plain(checkpoint):
    """Answers of plain vLLM, and what it gives to a few special requests."""
    with engine(checkpoint, Options(mode="ar", max_num_seqs=8)) as llm:
        changed = [answers(llm, PROMPTS[:2], **params) for params in PROCESSED]
        return {"greedy": answers(llm, PROMPTS, 60), "processed": changed}


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


def oracle(plain):
    return Oracle([prompt + answer for prompt, answer in zip(PROMPTS, plain["greedy"], strict=True)])


def test_processed_logits(served, plain):
    steps = count(metrics.STEPS)
    assert [answers(served, PROMPTS[:2], **params) for params in PROCESSED] == plain["processed"]
    assert count(metrics.STEPS) > steps


def test_prefix_cache_and_chunked_prefill(checkpoint, plain):
    with engine(checkpoint, TIDAR, max_num_batched_tokens=32, enable_prefix_caching=True) as llm:
        start = free_blocks(llm)
        for _ in range(2):
            assert answers(llm, PROMPTS, 60) == plain["greedy"]
        longer = [prompt + answer[:40] for prompt, answer in zip(PROMPTS, plain["greedy"], strict=True)]
        assert answers(llm, longer, 20) == [answer[40:60] for answer in plain["greedy"]]
        assert free_blocks(llm) == start


def test_context_edge(served, checkpoint):
    prompts = [some_prompt(CONTEXT - left, left) for left in (1, 2, 5, 12, 30)]
    with engine(checkpoint, Options(mode="ar")) as llm:
        expected = answers(llm, prompts, 100)
    assert answers(served, prompts, 100) == expected
    assert [len(answer) for answer in expected] == [1, 2, 5, 12, 30]


def test_switch_and_plain_neighbours(served, plain):
    steps = count(metrics.STEPS)
    off = answers(served, PROMPTS, 60, extra_args={"tidar": False})
    assert off == plain["greedy"] and count(metrics.STEPS) == steps
    kinds = [{}, {"extra_args": {"tidar": 0}}, {"logprobs": 2}]
    asked = [SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, detokenize=False, **kind) for kind in kinds]
    outputs = served.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS[:3]], asked, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == plain["greedy"][:3]
    assert count(metrics.STEPS) > steps
    told = outputs[2].outputs[0].logprobs
    assert len(told) == 60 and all(token in entry for token, entry in zip(plain["greedy"][2], told, strict=True))


def test_sampling_follows_the_models_distribution(checkpoint, plain):
    """The second and third tokens of many seeded requests, against what plain decoding would draw them from."""
    draws, prompt = 1536, PROMPTS[0]
    asked = [
        SamplingParams(max_tokens=3, temperature=0.8, top_k=4, seed=seed, ignore_eos=True, detokenize=False)
        for seed in range(draws)
    ]
    options = Options(cuda=False, max_num_seqs=32, curve=((32, 4, 1),))
    with engine(checkpoint, options) as llm:
        with oracle(plain).instead(llm):
            outputs = llm.generate([{"prompt_token_ids": prompt}] * draws, asked, use_tqdm=False)
    seen = Counter(tuple(output.outputs[0].token_ids) for output in outputs)
    expected = exact_continuations(checkpoint, prompt, 3, temperature=0.8, top_k=4)
    assert seen.keys() <= expected.keys()
    likely = {text: chance * draws for text, chance in expected.items() if chance * draws >= 5}
    rest = draws - sum(likely.values())
    squares = sum((seen[text] - number) ** 2 / number for text, number in likely.items())
    squares += (sum(n for text, n in seen.items() if text not in likely) - rest) ** 2 / max(rest, 1)
    freedom = len(likely)
    assert squares < freedom + 4 * (2 * freedom) ** 0.5, (squares, freedom)


def exact_continuations(folder, prompt, new, temperature, top_k):
    """Every continuation of `new` tokens, with its probability."""
    lm, law = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), dict[tuple[int, ...], float]()
    params = sampling.SamplingParams(temperature, top_k=top_k)
    frontier = {(): 1.0}
    for _ in range(new):
        rows = torch.tensor([[*prompt, *text] for text in frontier])
        with torch.inference_mode():
            probs = params.probabilities(lm(rows).logits[:, -1])
        law = {
            (*text, token): chance * float(row[token])
            for (text, chance), row in zip(frontier.items(), probs, strict=True)
            for token in row.nonzero().flatten().tolist()
        }
        frontier = law
    return law


def test_seeds_repeat(served):
    params = {"temperature": 1.0, "seed": 7}
    first = answers(served, PROMPTS[:2], 40, **params)
    assert first == answers(served, PROMPTS[:2], 40, **params) != answers(served, PROMPTS[:2], 40, temperature=1.0, seed=8)


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
    assert not core(served).scheduler.running and not core(served).scheduler.waiting


@pytest.mark.parametrize(("arch", "lossless"), [("qwen2", True), ("qwen3", False), ("olmo2", True)])
def test_other_models(tmp_path, arch, lossless):
    folder = tiny_checkpoint(tmp_path, arch, lossless)
    with engine(folder, Options(mode="ar")) as llm:
        expected = answers(llm, PROMPTS[:3])
    with engine(folder, Options(cuda=False, draft_length=4, outcomes=2)) as llm:
        steps = count(metrics.STEPS)
        assert answers(llm, PROMPTS[:3]) == expected
        assert count(metrics.STEPS) > steps


def test_drafts_are_the_local_engines(checkpoint):
    """Not only exact but as good: the same forwards per answer as tidar's own decoder."""
    from tidar import TidarModel
    from tidar.decode.engine import Engine, Limits
    from tidar.decode.step import Plan

    local = TidarModel.from_pretrained(checkpoint, device="cpu", dtype="float32")
    [*_, updates] = Engine(local.network, Plan(4, outcomes=2)).run([PROMPTS[0]], Limits(60))
    with engine(checkpoint, Options(cuda=False, draft_length=4, outcomes=2)) as llm, torch.inference_mode():
        steps, tokens = count(metrics.STEPS), count(metrics.TOKENS)
        assert answers(llm, PROMPTS[:1], 60)[0] == updates[0].answer.token_ids
        forwards = count(metrics.STEPS) - steps
    # A prompt's forward drafts here but not there, so the first step of vLLM's has nothing to judge.
    assert abs(forwards + 1 - updates[0].answer.forwards) <= 2, (forwards, updates[0].answer.forwards, tokens)
