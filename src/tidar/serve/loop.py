"""The one batched loop: a thread that lets jobs join a running batch, and frees their places when they end.

A job is one row: one answer to one prompt. Its tokens do not depend on the other rows (in float32, where another batch
size does not round differently), see `Loop.drafts_for`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from tidar.apart import apart
from tidar.decode.engine import Answer, FinishReason, Limits, Planner, Row, extend, new_row
from tidar.decode.planner import AutoPlanner
from tidar.decode.runner import Gain, Runner, runner_for
from tidar.decode.step import Plan, State
from tidar.model.network import Network
from tidar.sampling import Logprobs, SamplingParams, together
from tidar.serve.metrics import Metrics

log = logging.getLogger(__name__)

PREFILL_TOKENS = 4096
"""Padded tokens of one prefill, if it has several prompts; running rows wait for it."""


class QueueFullError(Exception):
    """There is no room for more waiting jobs."""


class ClosedError(Exception):
    """The loop has been stopped."""


class TokenLogprobs(NamedTuple):
    """A token's log-probability, and the likeliest tokens in its place with theirs."""

    chosen: float
    likeliest: list[tuple[int, float]]


class Piece(NamedTuple):
    """What one forward gave a job.

    Attributes:
        token_ids, text: what is new.
        logprobs: of each new token where the job asks for them, else empty.
        finish_reason: set by the last piece.
        answer: all of the answer; it still grows in the loop's thread until the last piece is there.
        failed: why the answer does not go on; this is the last piece then, and nothing in it is new.
    """

    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None
    answer: Answer
    failed: str | None = None


Deliver = Callable[[Piece], None]


@dataclass
class Job:
    """One answer that is wanted.

    Attributes:
        prompt: token ids.
        limits: when it ends; there must be room for `max_new_tokens`.
        params: how its tokens are chosen.
        deliver: called by the loop's thread with every piece; must return at once.
        choice: index of the answer in its request: choices draw from different random streams.
        drafting: whether drafts are judged in its row.
        logprobs: likeliest tokens beside each one's log-probability; None for no log-probabilities.
    """

    prompt: list[int]
    limits: Limits
    params: SamplingParams
    deliver: Deliver
    choice: int = 0
    drafting: bool = True
    logprobs: int | None = None
    cancelled: bool = field(default=False, init=False)


class _Running(NamedTuple):
    job: Job
    row: Row

    @property
    def ended(self) -> bool:
        return self.job.cancelled or self.row.answer.finish_reason is not None


class Loop:
    """Decodes jobs in a thread of its own, from `start` to `stop`.

    Args:
        network, tokenizer: the model. Nobody else may decode with it meanwhile.
        planner: what forwards do; its sampling parameters are replaced by those of the rows.
        rows: the largest batch.
        waiting: jobs that may wait for a place in it.
        context: longest prompt and answer together, in tokens.
    """

    def __init__(
        self,
        network: Network,
        tokenizer: PreTrainedTokenizerBase,
        planner: Planner,
        *,
        rows: int,
        waiting: int,
        context: int,
        metrics: Metrics,
    ) -> None:
        self.network, self.tokenizer, self.planner, self.metrics = network, tokenizer, planner, metrics
        if isinstance(planner, AutoPlanner):
            planner.in_step = False
        self.rows, self.most_waiting, self.context = rows, waiting, context
        self.runner: Runner = runner_for(network)
        self._places: list[_Running | None] = []
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._open, self._thread, self._threads = False, threading.Thread(), torch.get_num_threads()
        metrics.running.set_function(lambda: self.running)
        metrics.waiting.set_function(lambda: self.queued)

    @property
    def drafts(self) -> bool:
        """Whether rows may be drafted for at all."""
        return self.planner.longest.drafting

    def drafts_for(self, params: SamplingParams, seeded: bool) -> bool:
        """Whether a row should be drafted for.

        What a sampled row draws depends on what is drafted for it, and a planner that learns drafts now this, now that.
        So where a seed must give the same answer again, such a row is decoded plainly.
        """
        return self.drafts and not (isinstance(self.planner, AutoPlanner) and seeded and not params.greedy)

    @property
    def running(self) -> int:
        return sum(place is not None for place in self._places)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def open(self) -> bool:
        """Whether jobs are taken."""
        return self._open

    def start(self) -> None:
        """Make room for the batch, measure if the planner wants to, and begin to wait for jobs; once is enough."""
        if self._open:
            return
        self.runner.busy = True
        apart(self._measure)
        self._open = True
        self._thread = threading.Thread(target=self._run, name="tidar-loop", daemon=True)
        self._thread.start()

    def _measure(self) -> None:
        torch.set_num_threads(self._threads)  # each thread of Python has a number of its own
        self._prepare()
        self.planner.prepare(self.runner, self.runner.batch_for(self.rows))
        self._prepare()

    def stop(self) -> None:
        """End the thread after the forward that it is in; jobs that did not end are failed."""
        with self._changed:
            self._open = False
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self.runner.busy = False

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait for places, all of them or none. Raises QueueFullError or ClosedError."""
        with self._changed:
            if not self._open:
                raise ClosedError
            if len(self._waiting) + len(jobs) > self.most_waiting + self.rows - self.running:
                raise QueueFullError
            self._waiting += jobs
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Forget jobs, ended or not: those that run leave before the next forward."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            if any(job.cancelled for job in self._waiting):
                self._waiting = deque(job for job in self._waiting if not job.cancelled)

    def _prepare(self) -> State:
        longest = self.planner.longest
        most = self.runner.batch_for(self.rows)
        sampled = replace(longest, params=SamplingParams(1.0))  # greedy rows do not mind
        room = self.context + (self.runner.lag + 2) * longest.draft_length + longest.slots
        self._places = [None] * most
        return self.runner.prepare(most, room, sampled)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while self._has_work():
                try:
                    self._turn()
                except Exception:
                    log.exception("decoding failed; the answers that were running are lost")
                    self._fail("the server failed while it decoded this answer; its log says why")
                    self._prepare()
        finally:
            self._open = False
            self._fail("the server has stopped before this answer ended")

    def _has_work(self) -> bool:
        """Wait for some; False if there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open or self._waiting or self.running)
            return self._open

    def _fail(self, why: str) -> None:
        """Tell everybody that there will be no more."""
        with self._changed:
            jobs = [place.job for place in self._places if place is not None] + list(self._waiting)
            self._waiting.clear()
            self._places = [None] * len(self._places)
        for job in jobs:
            if not job.cancelled:
                self.metrics.ended.labels("failed").inc()
                job.deliver(Piece([], "", [], None, Answer(job.choice), why))

    def _turn(self) -> None:
        """Free places, fill them, and run one forward over the batch."""
        self._leave()
        while joining := self._join():
            self._admit(*joining)
        self._leave()
        if self.running:
            self._forward()

    def _leave(self) -> None:
        """Take out what has ended or was cancelled."""
        with self._changed:
            for place, running in enumerate(self._places):
                if running is not None and running.ended:
                    self._places[place] = None
                    self.metrics.ended.labels(running.row.answer.finish_reason or "cancelled").inc()

    def _join(self) -> tuple[list[int], list[_Running]] | None:
        """Give places to the jobs that came first, as many as fit into one prefill: the places, and who takes them."""
        with self._changed:
            free = [place for place, running in enumerate(self._places) if running is None][: self.rows - self.running]
            count = _fitting([len(job.prompt) for job, _ in zip(self._waiting, free, strict=False)])
            joining = [_Running(job, self._new_row(job)) for job in islice(self._waiting, count)]
            for place, running in zip(free, joining, strict=False):
                self._places[place] = running
                self._waiting.popleft()
        return (free[:count], joining) if count else None

    def _admit(self, places: list[int], joining: list[_Running]) -> None:
        """Prefill the prompts of rows that have got places; the first token of each comes from it."""
        jobs = [running.job for running in joining]
        plan = self._for_rows(self.planner.first(self._size()), [job.params for job in jobs], jobs)
        started = time.perf_counter()
        choices = [job.choice for job in jobs]
        admitted = self.runner.admit([job.prompt for job in jobs], choices, places, plan)
        tokens = admitted.tokens()
        said = _on_host(jobs, [piece.logprobs for piece in admitted.pieces])
        self.metrics.forwards.labels("prefill").inc()
        self.metrics.prompt_tokens.inc(sum(len(job.prompt) for job in jobs))
        self.metrics.prefill.observe(time.perf_counter() - started)
        for running, token, logprobs in zip(joining, tokens, said, strict=True):
            running.row.started = started
            self._give(running, [token], logprobs)

    def _new_row(self, job: Job) -> Row:
        return new_row(self.network, self.tokenizer, job.choice, job.prompt, job.limits, streaming=True)

    def _forward(self) -> None:
        """One step over the batch, and what it gives to whom."""
        self._close_ranks()
        size = self._size()
        places = self._places[:size]
        rows = [running for running in places if running is not None]
        plain = all(not running.job.drafting for running in rows)
        plan = Plan(1) if plain else self.planner.choose(size)
        params = [(running or rows[0]).job.params.unseeded for running in places]
        plan = self._for_rows(plan, params, [running.job for running in rows])
        self._drop_drafts(places)
        self.runner.set_active([running is not None for running in places])
        pending = self.runner.step(plan, size, max(running.row.length for running in rows))
        gains = pending.get()
        said = _on_host([running and running.job for running in places], [pending.logprobs])
        self.metrics.forwards.labels("step").inc()
        gained = [(running, gain) for running, gain in zip(places, gains, strict=True) if running is not None]
        self._observe(plan, [gain for running, gain in gained if running.job.drafting])
        for running, gain, logprobs in zip(places, gains, said, strict=True):
            if running is not None:
                running.row.length += len(gain.tokens)
                self._give(running, gain.tokens, logprobs)

    def _for_rows(self, plan: Plan, params: list[SamplingParams], jobs: Sequence[Job]) -> Plan:
        """The plan, for rows that are sampled like this and jobs that want this much said."""
        most = max((job.logprobs for job in jobs if job.logprobs is not None), default=None)
        return replace(plan, params=together(params), logprobs=most)

    def _drop_drafts(self, places: Sequence[_Running | None]) -> None:
        assert self.runner.state is not None
        plain = [place for place, running in enumerate(places) if running is not None and not running.job.drafting]
        if plain and self.drafts:
            self.runner.state.drop_drafts(torch.tensor(plain, device=self.network.device))

    def _observe(self, plan: Plan, gains: Sequence[Gain]) -> None:
        for gain in gains:
            self.metrics.acceptance.observe(len(gain.tokens))
        if gains:
            self.planner.observe(plan, gains)

    def _give(self, running: _Running, tokens: list[int], logprobs: list[TokenLogprobs]) -> None:
        """Append tokens to an answer, and tell whoever waits for it."""
        if running.job.cancelled:
            return
        answer, tokens, text = extend(running.row, tokens, running.job.limits)
        self.metrics.tokens.inc(len(tokens))
        running.job.deliver(Piece(tokens, text, logprobs[: len(tokens)], answer.finish_reason, answer))

    def _size(self) -> int:
        """Rows of a forward: up to the last place that is taken, in sizes that the runner likes."""
        taken = [place for place, running in enumerate(self._places) if running is not None]
        return self.runner.batch_for(1 + max(taken, default=0))

    def _close_ranks(self) -> None:
        """Move the last rows to free places before them, so that no forward computes empty ones."""
        count, state = self.running, self.runner.state
        assert state is not None
        free = [place for place, running in enumerate(self._places[:count]) if running is None]
        for last, running in enumerate(self._places[count:], count):
            if running is not None:
                place = free.pop()
                state.copy_row(last, place, running.row.length)
                with self._changed:
                    self._places[place], self._places[last] = running, None
                self.runner.active = []  # whoever was there before may have been inactive


def _fitting(lengths: Sequence[int]) -> int:
    """How many of the first prompts fit into one prefill, padded to the longest: at least one."""
    longest = 0
    for count, length in enumerate(lengths):
        longest = max(longest, length)
        if count and longest * (count + 1) > PREFILL_TOKENS:
            return count
    return len(lengths)


def _on_host(jobs: Sequence[Job | None], pieces: Sequence[Logprobs | None]) -> list[list[TokenLogprobs]]:
    """Log-probabilities of each row's tokens, for the jobs that want them."""
    if not any(job is not None and job.logprobs is not None for job in jobs):
        return [[] for _ in jobs]
    chosen, ids, others = (
        torch.cat([piece[part].cpu() for piece in pieces if piece is not None]).tolist() for part in range(3)
    )
    return [
        []
        if job is None or job.logprobs is None
        else [
            TokenLogprobs(own, list(zip(i, o, strict=True))[: job.logprobs])
            for own, i, o in zip(chosen[row], ids[row], others[row], strict=True)
        ]
        for row, job in enumerate(jobs)
    ]
