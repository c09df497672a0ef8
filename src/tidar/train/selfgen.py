"""Let the base model answer prompts: a drafter must match the style of the model that it drafts for."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

from tidar.decode.engine import Engine, Limits
from tidar.decode.step import Plan
from tidar.model import hub
from tidar.model.network import Network
from tidar.sampling import SamplingParams
from tidar.train.data import Sample


@dataclass(frozen=True)
class Generation:
    """How answers are sampled.

    Attributes:
        temperatures: the prompts go round them, so that the drafter sees sure and daring continuations alike.
        answers: how often each prompt is answered, each time at the next temperature.
        max_new_tokens: longest answer.
        max_prompt_tokens: longer prompts are left out (and counted on stderr).
        batch_size: rows decoded together in each process.
        seconds: stop after about this long; finished answers are kept. None: answer everything.
    """

    temperatures: tuple[float, ...] = (0.0, 0.5, 0.8, 1.0)
    answers: int = 1
    max_new_tokens: int = 256
    max_prompt_tokens: int = 256
    batch_size: int = 8
    seed: int = 0
    seconds: float | None = None


def self_generate_parallel(
    name: str, device: str | None, dtype: str, prompts: Sequence[list[int]], how: Generation, workers: int
) -> list[Sample]:
    """`self_generate` by several processes that share the device: one alone is bound by Python, not by the GPU."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        shards = [
            pool.submit(_work, name, device, dtype, prompts[k::workers], replace(how, seed=how.seed + 1000 * k), k == 0)
            for k in range(workers)
        ]
        return [sample for shard in shards for sample in shard.result()]


def _work(
    name: str, device: str | None, dtype: str, prompts: Sequence[list[int]], how: Generation, loud: bool
) -> list[Sample]:
    network = hub.load(name, drafter="none", device=device, dtype=dtype).network
    return self_generate(network, prompts, how, loud)


def self_generate(network: Network, prompts: Sequence[list[int]], how: Generation, loud: bool = True) -> list[Sample]:
    """Answers of the plain AR model to `prompts` (token ids); progress goes to stderr if `loud`."""
    encoded = [ids for ids in prompts if len(ids) <= how.max_prompt_tokens]
    if (left_out := len(prompts) - len(encoded)) and loud:
        print(f"self-generation: {left_out} prompts over {how.max_prompt_tokens} tokens left out", file=sys.stderr)
    temperatures = how.temperatures
    jobs = [
        (ids, temperatures[(i + n) % len(temperatures)]) for n in range(how.answers) for i, ids in enumerate(encoded)
    ]
    random.Random(how.seed).shuffle(jobs)
    started, tokens, samples = time.perf_counter(), 0, list[Sample]()
    for k, temperature in enumerate(temperatures):
        mine = [ids for ids, t in jobs if t == temperature]
        if not mine:
            continue
        plan = Plan(1, SamplingParams(temperature, seed=how.seed + k))
        deadline = None if how.seconds is None else started + how.seconds * (k + 1) / len(temperatures)
        for updates in Engine(network, plan).run(mine, Limits(how.max_new_tokens, network.eos_ids), how.batch_size):
            for update in updates:
                answer = update.answer
                if answer.finish_reason is not None:
                    samples.append(Sample([*mine[answer.row], *answer.token_ids], len(mine[answer.row])))
                    tokens += answer.new_tokens
                    if loud and len(samples) % 500 == 0:
                        _progress(len(samples), len(jobs), tokens, time.perf_counter() - started)
            if deadline is not None and time.perf_counter() > deadline:
                break
    if loud:
        _progress(len(samples), len(jobs), tokens, time.perf_counter() - started, end="\n")
    return samples


def _progress(done: int, of: int, tokens: int, seconds: float, end: str = "\r") -> None:
    rate = tokens / max(seconds, 1e-9)
    print(
        f"self-generation: {done}/{of} answers, {tokens:,} tokens, {rate:,.0f} tokens/s ",
        end=end,
        file=sys.stderr,
        flush=True,
    )
