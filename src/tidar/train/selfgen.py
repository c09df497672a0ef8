"""Let the base model answer prompts: a drafter must match the style of the model that it drafts for."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tidar.decode.engine import Engine, Limits
from tidar.decode.step import Plan
from tidar.model.network import Network
from tidar.prompts import Prompt, encode_prompt
from tidar.sampling import SamplingParams
from tidar.train.data import Sample


def self_generate(
    network: Network,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    temperatures: Sequence[float] = (0.0, 0.5, 0.8, 1.0),
    answers: int = 1,
    max_new_tokens: int = 256,
    max_prompt_tokens: int = 256,
    batch_size: int = 8,
    seed: int = 0,
    eos_ids: frozenset[int] = frozenset(),
    max_seconds: float | None = None,
) -> list[Sample]:
    """Answers of the plain AR model, sampled at a mix of temperatures.

    Args:
        answers: how often each prompt is answered; the prompts go round the temperatures.
        max_prompt_tokens: longer prompts are left out (and counted on stderr).
        max_seconds: stop early; finished answers are kept.
    """
    encoded = [ids for p in prompts if len(ids := encode_prompt(tokenizer, p)) <= max_prompt_tokens]
    if left_out := len(prompts) - len(encoded):
        print(f"self-generation: {left_out} prompts over {max_prompt_tokens} tokens left out", file=sys.stderr)
    jobs = [(ids, temperatures[(i + n) % len(temperatures)]) for n in range(answers) for i, ids in enumerate(encoded)]
    random.Random(seed).shuffle(jobs)
    started, tokens, samples = time.perf_counter(), 0, list[Sample]()
    for k, temperature in enumerate(temperatures):
        mine = [ids for ids, t in jobs if t == temperature]
        if not mine:
            continue
        plan = Plan(1, SamplingParams(temperature, seed=seed + k), network.device)
        deadline = None if max_seconds is None else started + max_seconds * (k + 1) / len(temperatures)
        for updates in Engine(network, plan).run(mine, Limits(max_new_tokens, eos_ids), batch_size):
            for update in updates:
                answer = update.answer
                if answer.finish_reason is not None:
                    samples.append(Sample([*mine[answer.row], *answer.token_ids], len(mine[answer.row])))
                    tokens += answer.new_tokens
                    if len(samples) % 1000 == 0:
                        _progress(len(samples), len(jobs), tokens, time.perf_counter() - started)
            if deadline is not None and time.perf_counter() > deadline:
                break
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
