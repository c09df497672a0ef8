"""Bulk decoding is the engine's plain decoding, token for token, whatever the batch, the chunks and the refills."""

import pytest
import torch

from tidar import TidarError
from tidar.decode import bulk
from tidar.decode.bulk import Job, decode_bulk
from tidar.decode.engine import Engine, Limits
from tidar.decode.step import Plan
from tidar.sampling import SamplingParams
from tiny import ARCHITECTURES, CONTEXT, tiny_network

PROMPTS = [
    torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (6, 1, 17, 2, 9, 30, 4, 4, 11, 3, 25, 8, 14)
]


def network_with_ends(arch, ends=(5, 17, 60, 80)):
    network = tiny_network(arch, draft=False)
    network.lm.generation_config.eos_token_id = list(ends)
    return network


def by_engine(network, params, prompts, limit):
    answers = {}
    for updates in Engine(network, Plan(1, params)).run(prompts, Limits(limit, network.eos_ids), 4):
        answers.update({u.answer.row: u.answer for u in updates})
    return {row: (a.token_ids, a.finish_reason) for row, a in answers.items()}


def by_bulk(network, params, jobs, limit, batch):
    chunks = list(decode_bulk(network, params, jobs, limit, batch))
    finished = [answer for chunk in chunks for answer in chunk.finished]
    assert len(finished) == len(jobs)
    assert sum(chunk.tokens for chunk in chunks) == sum(len(answer.token_ids) for answer in finished)
    return {a.row: (a.token_ids.tolist(), "stop" if a.stopped else "length") for a in finished}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bulk_equals_the_engine(arch, temperature):
    network, params = network_with_ends(arch), SamplingParams(temperature, seed=3)
    jobs = [Job(row, prompt) for row, prompt in enumerate(PROMPTS)]
    expected = by_engine(network, params, PROMPTS, 40)
    assert {reason for _, reason in expected.values()} == {"stop", "length"} or arch != "llama"
    assert by_bulk(network, params, jobs, 40, 5) == expected


def test_rows_grow_past_what_attention_sees_at_first():
    network = network_with_ends("llama", ends=())
    jobs = [Job(row, prompt) for row, prompt in enumerate(PROMPTS[:3])]
    assert by_bulk(network, SamplingParams(), jobs, 100, 3) == by_engine(network, SamplingParams(), PROMPTS[:3], 100)


@pytest.mark.parametrize(("chunk", "batch", "refill"), [(1, 3, 1), (3, 13, 16), (64, 4, 2), (8, 1, 16), (5, 100, 16)])
def test_neither_chunk_nor_batch_changes_an_answer(chunk, batch, refill, monkeypatch):
    monkeypatch.setattr(bulk, "CHUNK", chunk)
    monkeypatch.setattr(bulk, "REFILL", refill)
    monkeypatch.setattr(bulk, "PREFILL_TOKENS", 24)
    network, params = network_with_ends("llama"), SamplingParams(1.0, seed=9)
    jobs = [Job(row, prompt) for row, prompt in enumerate(PROMPTS)]
    assert by_bulk(network, params, jobs, 30, batch) == by_engine(network, params, PROMPTS, 30)


def test_a_part_of_a_job_draws_the_numbers_of_the_whole():
    network, params = network_with_ends("llama"), SamplingParams(1.0, seed=1)
    whole = by_engine(network, params, PROMPTS, 25)
    part = [Job(row, PROMPTS[row]) for row in (7, 2, 11)]
    assert by_bulk(network, params, part, 25, 2) == {row: whole[row] for row in (7, 2, 11)}


def test_answers_end_where_the_context_does():
    network = network_with_ends("gpt_bigcode", ends=())
    jobs = [Job(0, PROMPTS[0] * 20), Job(1, [1, 2])]
    assert len(jobs[0].prompt) == CONTEXT - 8
    answers = by_bulk(network, SamplingParams(), jobs, 50, 2)
    assert [len(answers[row][0]) for row in (0, 1)] == [8, 50]
    assert answers == by_engine(network, SamplingParams(), [job.prompt for job in jobs], 50)


@pytest.mark.parametrize("prompt", [[], [1] * CONTEXT])
def test_prompts_that_leave_no_room_are_refused(prompt):
    network = network_with_ends("llama")
    with pytest.raises(TidarError, match="prompt 5"):
        list(decode_bulk(network, SamplingParams(), [Job(3, [1]), Job(4, prompt)], 8, 2))
