"""Plain decoding of many prompts for throughput: nothing is streamed, and Python runs once a chunk of forwards.

The twin of `Engine` with a plan of one draft, token for token: rows draw from the same random streams. Every row of
the batch gains one token a forward, so that a chunk's tokens are one array and the host's work is a few numpy calls.
Rows that end inside a chunk compute to its end for nothing; free places are refilled between chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from tidar.decode.engine import room_for
from tidar.decode.runner import Runner, roomy_capacity, runner_for
from tidar.decode.step import Plan, State, StepResult, prefill
from tidar.model.network import Network
from tidar.sampling import SamplingParams

CHUNK = 8
"""Forwards between two looks at the tokens: a row that ended wastes half of it on average."""
REFILL = 16
"""Waiting prompts join once 1/16 of the batch is free."""
WINDOW = 4
"""So many batches of waiting prompts are sorted by length, so that prompts that join together need little padding."""
PREFILL_TOKENS = 16384
"""Most tokens in one prefill, padding included."""
MOST_ROWS, CPU_ROWS = 1024, 16


class Job(NamedTuple):
    """A prompt (token ids), and its row in the whole job, which keys its random stream."""

    row: int
    prompt: list[int]


class Finished(NamedTuple):
    """An answer. token_ids [n] int32, an end-of-sequence token included; stopped: it ended with one."""

    row: int
    token_ids: np.ndarray
    stopped: bool


class Chunk(NamedTuple):
    """What a chunk gave: tokens gained by all rows together, and the answers that are finished."""

    tokens: int
    finished: list[Finished]


def decode_bulk(
    network: Network, params: SamplingParams, jobs: Sequence[Job], max_new_tokens: int, batch_size: int
) -> Iterator[Chunk]:
    """Decode all jobs autoregressively, `batch_size` rows at a time. Answers come as they finish.

    Raises:
        TidarError: for an empty prompt or one that leaves no room in the model's context, before anything runs.
    """
    if not jobs:
        return
    rooms = [room_for(network, job.prompt, max_new_tokens, job.row) for job in jobs]
    plan, runner = Plan(1, params), runner_for(network)
    places = min(batch_size, len(jobs))
    longest = max(len(job.prompt) + room for job, room in zip(jobs, rooms, strict=True))
    runner.busy = True
    try:
        state = runner.prepare(places, longest + CHUNK + plan.slots, plan)
        batch = _Batch(network, runner, state, plan, places, max(rooms))
        yield from batch.run(deque(_by_length(list(zip(jobs, rooms, strict=True)), WINDOW * places)))
    finally:
        runner.busy = False


def fitting_batch(network: Network, tokens: int) -> int:
    """Rows of `tokens` cached tokens each that decode well together and fit into half of the free memory."""
    if network.device.type != "cuda":
        return CPU_ROWS
    cache = prefill(network, [[0]], [0], Plan(1)).cache
    a_token = sum(kept[0, :, 0].nbytes for kept in (*cache.keys, *cache.values))
    unused = torch.cuda.memory_reserved(network.device) - torch.cuda.memory_allocated(network.device)
    free = torch.cuda.mem_get_info(network.device)[0] + unused
    rows = free // 2 // (a_token * roomy_capacity(tokens))
    return int(max(1, min(MOST_ROWS, rows // 64 * 64 or rows)))


def _by_length(jobs: list[tuple[Job, int]], window: int) -> Iterator[tuple[Job, int]]:
    """The jobs in their order, but sorted by length within every `window` of them."""
    for start in range(0, len(jobs), window):
        yield from sorted(jobs[start : start + window], key=_prompt_length)


def _prompt_length(job: tuple[Job, int]) -> int:
    return len(job[0].prompt)


class _Batch:
    """The running rows, one in each place. All arrays are [places], tokens [places, room of the longest + CHUNK]."""

    def __init__(self, network: Network, runner: Runner, state: State, plan: Plan, places: int, room: int) -> None:
        self.network, self.runner, self.state, self.plan = network, runner, state, plan
        self.eos = np.array(sorted(network.eos_ids), np.int64)
        self.running = np.zeros(places, bool)
        self.row = np.zeros(places, np.int64)
        self.cached = np.zeros(places, np.int64)
        self.room = np.zeros(places, np.int64)
        self.count = np.zeros(places, np.int64)
        self.tokens = np.zeros((places, room + CHUNK), np.int32)

    def run(self, waiting: deque[tuple[Job, int]]) -> Iterator[Chunk]:
        while waiting or self.running.any():
            free = np.flatnonzero(~self.running)
            if waiting and len(free) * REFILL >= len(self.running):
                joining = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
                joining.sort(key=_prompt_length)
                yield self._admit(free[: len(joining)], joining)
            elif not waiting:
                self._compact()
            if self.running.any():
                yield self._forwards()

    def _admit(self, places: np.ndarray, joining: list[tuple[Job, int]]) -> Chunk:
        """Prefill jobs, which are sorted by length, into free places."""
        first: list[int] = []
        begin = 0
        while begin < len(joining):
            end = begin + 1
            while end < len(joining) and (end + 1 - begin) * len(joining[end][0].prompt) <= PREFILL_TOKENS:
                end += 1
            first += self._prefill([job for job, _ in joining[begin:end]], places[begin:end].tolist())
            begin = end
        self.running[places] = True
        self.row[places] = [job.row for job, _ in joining]
        self.cached[places] = [len(job.prompt) for job, _ in joining]
        self.room[places] = [room for _, room in joining]
        self.count[places] = 0
        return self._take(places, np.array(first)[:, None])

    def _prefill(self, jobs: list[Job], places: list[int]) -> list[int]:
        """Let jobs run in `places`; returns their first tokens."""
        return self.runner.admit([job.prompt for job in jobs], [job.row for job in jobs], places, self.plan).tokens()

    def _forwards(self) -> Chunk:
        """A chunk of forwards, read back together."""
        places = np.flatnonzero(self.running)
        self.runner.set_active(self.running.tolist())
        count = int(min(CHUNK, (self.room - self.count)[places].max()))
        longest = int(self.cached[places].max())
        pending = [self.runner.step(self.plan, len(self.running), longest + n) for n in range(count)]
        self.cached[places] += count
        gained = [StepResult(step.arrived()).new[:, 0].numpy()[places] for step in pending]
        return self._take(places, np.stack(gained, 1))

    def _take(self, places: np.ndarray, new: np.ndarray) -> Chunk:
        """Append the new tokens [n, m] of the rows in `places` [n] to their answers, up to where each ends."""
        width = new.shape[1]
        ends = np.isin(new, self.eos)
        to_eos = np.where(ends.any(1), ends.argmax(1) + 1, width + 1)
        before, left = self.count[places], self.room[places] - self.count[places]
        taken = np.minimum(np.minimum(to_eos, left), width)
        self.tokens[places[:, None], before[:, None] + np.arange(width)] = new
        self.count[places] += taken
        stopped = to_eos == taken
        over = stopped | (taken == left)
        finished = [self._finish(*ended) for ended in zip(places[over], stopped[over].tolist(), strict=True)]
        return Chunk(int(taken.sum()), finished)

    def _finish(self, place: int, stopped: bool) -> Finished:
        self.running[place] = False
        return Finished(int(self.row[place]), self.tokens[place, : self.count[place]].copy(), stopped)

    def _compact(self) -> None:
        """Go on with a quarter of the batch once that holds all rows: every size is captured anew on a GPU."""
        alive = np.flatnonzero(self.running)
        size = self.runner.batch_for(len(alive))
        if not len(alive) or 4 * size > len(self.running):
            return
        self.state.move_rows(torch.tensor(alive, device=self.state.drafts.device))
        self.runner.active = []  # the device's rows have moved
        for name in ("running", "row", "cached", "room", "count", "tokens"):
            kept = getattr(self, name)
            moved = np.zeros((size, *kept.shape[1:]), kept.dtype)
            moved[: len(alive)] = kept[alive]
            setattr(self, name, moved)
