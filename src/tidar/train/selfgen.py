"""Let the base model answer prompts: a drafter must match the style of the model that it drafts for."""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tidar.decode import bulk
from tidar.decode.runner import release
from tidar.errors import TidarError
from tidar.model.network import Network
from tidar.sampling import SamplingParams
from tidar.train.samples import ModelCard, Origin, Sample, Stored, load_samples, save_samples

TEMPERATURES = (0.0, 0.5, 0.8, 1.0)
SAVE_EVERY, SAVE_SHARE = 60.0, 0.05
"""Finished answers are saved each minute, or less often where saving would take more than this share of the time."""


@dataclass(frozen=True)
class Generation:
    """How answers are sampled.

    Attributes:
        temperatures: the prompts go round them, so that the drafter sees sure and daring continuations alike.
        answers: how often each prompt is answered, each time at the next temperature.
        max_new_tokens: longest answer.
        max_prompt_tokens: longer prompts are left out (and counted on stderr).
        batch_size: rows decoded together; None for as many as memory allows.
        seconds: stop after about this long; finished answers are kept. None: answer everything.
    """

    temperatures: tuple[float, ...] = TEMPERATURES
    answers: int = 1
    max_new_tokens: int = 256
    max_prompt_tokens: int = 256
    batch_size: int | None = None
    seed: int = 0
    seconds: float | None = None


class Task(NamedTuple):
    """One answer to give: its number in the whole job, and the places of its prompt and its temperature."""

    number: int
    prompt: int
    temperature: int


def tasks_of(prompts: Sequence[list[int]], how: Generation) -> list[Task]:
    """Every answer to give, in random order. Numbers stay the same whichever of them are done already."""
    count, temperatures = len(prompts), len(how.temperatures)
    tasks = [
        Task(again * count + prompt, prompt, (prompt + again) % temperatures)
        for again in range(how.answers)
        for prompt in range(count)
        if len(prompts[prompt]) <= how.max_prompt_tokens
    ]
    random.Random(how.seed).shuffle(tasks)
    return tasks


def job_key(prompts: Sequence[list[int]], how: Generation, model: ModelCard) -> str:
    """A hash of all that decides the answers (and not how many of them there is time for)."""
    options = (how.temperatures, how.answers, how.max_new_tokens, how.max_prompt_tokens, how.seed, tuple(model))
    digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
    for prompt in prompts:
        digest.update(np.array([len(prompt), *prompt], np.int32).tobytes())
    return digest.hexdigest()


def generate_answers(
    network: Network, prompts: Sequence[list[int]], how: Generation, path: Path, model: ModelCard
) -> Stored:
    """Answers of the plain AR model to `prompts` (token ids), kept in `path`; continues what is there already.

    The file is saved every minute, when time is up and at Ctrl-C (which is raised again). A continued job gives the
    answers of an uninterrupted one.

    Raises:
        TidarError: if the file holds answers to other prompts or options, or no answer was finished.
    """
    work = _Work(network, prompts, how, path, model)
    try:
        in_time = work.run()
    except KeyboardInterrupt:
        if work.done:
            work.save(interrupted=True)
            print(f"\n{len(work.done):,} answers are in {path}; run it again to continue", file=sys.stderr)
        raise
    finally:
        release(network)  # what follows may be training, which needs the memory
    if not work.done:
        raise TidarError(
            "self-generation finished no answer: give it shorter prompts, longer sequences or more --generation-minutes"
        )
    if not in_time or work.started_with != len(work.done):
        work.save(interrupted=False)
    return load_samples(path, model)


class _Work:
    """A job under way: answers by their task's number."""

    def __init__(
        self, network: Network, prompts: Sequence[list[int]], how: Generation, path: Path, model: ModelCard
    ) -> None:
        self.network, self.prompts, self.how, self.path, self.model = network, prompts, how, path, model
        self.key = job_key(prompts, how, model)
        self.tasks = tasks_of(prompts, how)
        self.done: dict[int, Sample] = self._load() if path.exists() else {}
        self.started_with = len(self.done)
        self.started = self.saved = self.shown = time.perf_counter()
        self.save_every, self.tokens = SAVE_EVERY, 0

    def _load(self) -> dict[int, Sample]:
        stored = load_samples(self.path, self.model)
        if stored.origin.key != self.key:
            raise TidarError(
                f"{self.path} holds answers to other prompts, or by other options: delete it or name another file"
            )
        return {job: Sample(*map(np.array, s)) for job, s in zip(stored.jobs.tolist(), stored.samples, strict=True)}

    def run(self) -> bool:
        """Answer what is not answered yet; False if time was up before the end."""
        if long := len(self.prompts) - len(self.tasks) // self.how.answers:
            _say(f"{long:,} prompts over {self.how.max_prompt_tokens:,} tokens left out")
        if self.started_with:
            _say(f"continues after {self.started_with:,} of {len(self.tasks):,} answers")
        rows = self.how.batch_size or bulk.fitting_batch(
            self.network, self.how.max_prompt_tokens + self.how.max_new_tokens
        )
        in_time = True
        for place in range(len(self.how.temperatures)):
            mine = [t for t in self.tasks if t.temperature == place and t.number not in self.done]
            in_time &= self._at(place, mine, rows)
        if self.tokens:
            self._show("\n")
        return in_time

    def _at(self, place: int, tasks: list[Task], rows: int) -> bool:
        """Answer `tasks` at one temperature, `rows` together, within its share of the time."""
        how = self.how
        deadline = None
        if how.seconds is not None:
            deadline = self.started + how.seconds * (place + 1) / len(how.temperatures)
        if not tasks:
            return True
        params = SamplingParams(how.temperatures[place], seed=how.seed + place)
        jobs = [bulk.Job(task.number, self.prompts[task.prompt]) for task in tasks]
        left = len(jobs)
        for chunk in bulk.decode_bulk(self.network, params, jobs, how.max_new_tokens, rows):
            self.tokens += chunk.tokens
            left -= len(chunk.finished)
            for answer in chunk.finished:
                prompt = self.prompts[answer.row % len(self.prompts)]
                self.done[answer.row] = Sample.after([*prompt, *answer.token_ids.tolist()], len(prompt))
            self._now_and_then()
            if deadline is not None and time.perf_counter() > deadline:
                break
        return not left

    def _now_and_then(self) -> None:
        now = time.perf_counter()
        if now - self.shown > 1:
            self._show("\r")
            self.shown = now
        if now - self.saved > self.save_every and self.done:
            self.save(interrupted=True)

    def save(self, interrupted: bool) -> None:
        """Write all answers; `interrupted`: the missing ones are still wanted."""
        began = time.perf_counter()
        complete = len(self.done) == len(self.tasks)
        origin = Origin(self.key, complete, interrupted and not complete)
        numbers = sorted(self.done)  # so that neither batches nor interruptions show in the file
        save_samples(self.path, (self.done[n] for n in numbers), self.model, origin, numbers)
        self.saved = time.perf_counter()
        self.save_every = max(SAVE_EVERY, (self.saved - began) / SAVE_SHARE)

    def _show(self, end: str) -> None:
        seconds = max(time.perf_counter() - self.started, 1e-9)
        fresh, left = len(self.done) - self.started_with, len(self.tasks) - len(self.done)
        to_go = left * seconds / fresh if fresh else None
        if self.how.seconds is not None:
            to_go = min(to_go or self.how.seconds, max(0.0, self.how.seconds - seconds))
        eta = "" if to_go is None or not left else f", {timedelta(seconds=round(to_go))} to go"
        rate = self.tokens / seconds
        text = f"{len(self.done):,}/{len(self.tasks):,} answers, {self.tokens:,} tokens, {rate:,.0f} tokens/s{eta}"
        _say(f"{text:<90}", end)


def _say(text: str, end: str = "\n") -> None:
    print(f"self-generation: {text}", end=end, file=sys.stderr, flush=True)


class Readable(NamedTuple):
    """A stored answer for people: the place of its prompt, its temperature, and its tokens."""

    prompt: int
    temperature: float
    token_ids: list[int]


def readable(stored: Stored, prompts: int, how: Generation) -> Iterator[Readable]:
    """The answers to a job of `prompts` prompts."""
    for job, (ids, answers) in zip(stored.jobs.tolist(), stored.samples, strict=True):
        again, prompt = divmod(job, prompts)
        yield Readable(prompt, how.temperatures[(prompt + again) % len(how.temperatures)], ids[answers].tolist())
