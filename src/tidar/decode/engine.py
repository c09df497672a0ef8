"""The loop around `step`: prompts in, tokens and text out as they come, each row ending when it wants to."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from tidar.decode.runner import Gain, Pending, Runner, runner_for
from tidar.decode.step import Plan, State
from tidar.decode.text import TextStream
from tidar.errors import TidarError
from tidar.model.network import Network

FinishReason = Literal["stop", "length"]


class Limits(NamedTuple):
    """When an answer ends: after `max_new_tokens`, at an end-of-sequence id, or before a stop string."""

    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()


@dataclass
class Answer:
    """One row's output, growing while it is decoded.

    Attributes:
        row: index of the prompt in the job.
        token_ids: new tokens, an end-of-sequence token included.
        text: their text without special tokens, cut before a stop string; empty where the engine has no tokenizer, and
            until the end where nobody follows it.
        forwards: forward passes spent on this row, the prefill counted.
        acceptance_lengths: tokens gained by each forward after the prefill (the prefill itself gains one). In block
            diffusion: tokens that each forward decided, the first one's too, and those behind an end that came later.
        seconds: from the start of the row's prefill to its last token.
        finish_reason: "stop" (end of sequence or stop string), "length", or None while running.
    """

    row: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    forwards: int = 0
    acceptance_lengths: list[int] = field(default_factory=list)
    seconds: float = 0.0
    finish_reason: FinishReason | None = None

    @property
    def new_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tokens_per_forward(self) -> float:
        return self.new_tokens / self.forwards


class Update(NamedTuple):
    """What one forward gave one row: its answer so far, and the tokens and text that are new."""

    answer: Answer
    token_ids: list[int]
    text: str


@dataclass
class Row:
    """A running row: its answer, how many new tokens fit, and the tokens in its cache.

    streaming: whether its text is followed as it grows, for whoever reads it or for stop strings.
    under_way: forwards that were launched for it and not read back yet; each gives it a token at least.
    """

    answer: Answer
    stream: TextStream | None
    streaming: bool
    room: int
    length: int
    started: float
    under_way: int = 0

    @property
    def wants(self) -> bool:
        """Whether it needs another forward, whatever those under way bring."""
        return self.answer.finish_reason is None and self.answer.new_tokens + self.under_way < self.room


class Planner(Protocol):
    """Decides, before every forward, what it does."""

    longest: Plan
    """The plan with the longest drafts that it may choose; a run begins with it."""

    def prepare(self, runner: Runner, rows: int) -> None:
        """Called before a run over batches of up to `rows` rows; may use the runner, whose state has room for them."""
        ...

    def first(self, rows: int, last: bool = False) -> Plan:
        """Plan of a prefill into a batch of `rows` rows: its draft length is what counts.

        last: whether no prompt waits for the places of rows that will end.
        """
        ...

    def choose(self, rows: int, last: bool = False) -> Plan:
        """Plan of the next forward over a batch of `rows` rows."""
        ...

    def observe(self, plan: Plan, gains: Sequence[Gain]) -> None:
        """Called once a forward of `plan`, with what it gave each row."""
        ...


@dataclass
class Fixed:
    """The same plan always."""

    longest: Plan

    def prepare(self, runner: Runner, rows: int) -> None:
        """Nothing to prepare."""

    def first(self, rows: int, last: bool = False) -> Plan:
        return self.longest

    def choose(self, rows: int, last: bool = False) -> Plan:
        return self.longest

    def observe(self, plan: Plan, gains: Sequence[Gain]) -> None:
        """Nothing to learn."""


class Engine:
    """Decodes batches on any device; rows accept different numbers of tokens and end at different times."""

    def __init__(
        self,
        network: Network,
        plan: Plan | Planner,
        tokenizer: PreTrainedTokenizerBase | None = None,
        runner: Runner | None = None,
    ) -> None:
        self.network, self.tokenizer = network, tokenizer
        self.runner = runner  # None: the network's own, which fuses its weights
        self.planner = Fixed(plan) if isinstance(plan, Plan) else plan
        if network.config is not None and network.config.objective == "block-diffusion":
            raise TidarError(
                "this is a block-diffusion model, trained without an autoregressive term: mode 'block-diffusion' "
                "decodes it; for 'tidar' and 'ar', convert its base with --objective lossless or paper"
            )
        if self.planner.longest.drafting and not network.can_draft:
            raise TidarError("this model has no drafter: convert it with `tidar train`, or decode with mode 'ar'")

    def run(
        self, prompts: Sequence[list[int]], limits: Limits, batch_size: int | None = None, streaming: bool = True
    ) -> Iterator[list[Update]]:
        """Decode prompts (token ids), `batch_size` at a time (default: all); yields every forward's updates.

        Free places in the batch are refilled from the waiting prompts. Without `streaming` an answer has its text only
        when it has ended, which costs less.

        Raises:
            TidarError: for an empty prompt or one that leaves no room in the model's context, before anything runs.
        """
        waiting = deque(
            new_row(self.network, self.tokenizer, i, prompt, limits, streaming) for i, prompt in enumerate(prompts)
        )
        most = min(batch_size or len(prompts), len(prompts))
        if not most:
            return
        plan, runner = self.planner.longest, self.runner or runner_for(self.network)
        room = max(len(prompts[row.answer.row]) + row.room for row in waiting)
        capacity = room + (runner.lag + 2) * plan.draft_length + plan.slots
        runner.busy = True
        try:
            # Made before the planner measures with it: a state that grew later would cost what was captured by then.
            runner.prepare(runner.batch_for(most), capacity, plan)
            self.planner.prepare(runner, runner.batch_for(most))
            state = runner.prepare(runner.batch_for(most), capacity, plan)
            yield from self._loop(runner, state, waiting, most, prompts, limits)
        finally:
            runner.busy = False

    def _loop(
        self,
        runner: Runner,
        state: State,
        waiting: deque[Row],
        most: int,
        prompts: Sequence[list[int]],
        limits: Limits,
    ) -> Iterator[list[Update]]:
        slots: list[Row | None] = [None] * runner.batch_for(most)
        running = deque[Callable[[], list[Update]]]()  # forwards that are under way: each waits for its own and says
        idle = 0  # places that were free in each forward since the last prefill, while prompts waited
        plan = self.planner.longest
        while waiting or any(slots):
            free = [slot for slot, row in enumerate(slots) if row is None]
            places = free[: most - (len(slots) - len(free))]  # the batch may be larger than was asked for
            idle += len(places) if waiting else 0
            # Not before waiting has cost as much as a prefill: one for every single row would cost more than it fills.
            if waiting and (idle > most * runner.prefill_forwards or not any(slots)):
                joining, idle = [waiting.popleft() for _ in range(min(len(places), len(waiting)))], 0
                slots = list(slots)  # a forward that is under way keeps its own
                running.append(self._admit(runner, places, joining, slots, prompts, limits, not waiting))
            elif not waiting:
                slots = _compact(runner, state, slots, plan)
            if _wanting(slots):
                plan = self.planner.choose(len(slots), not waiting)
                # To capture a step takes long: what is known by then comes first.
                yield from _read(running, runner.lag if runner.ready(plan, len(slots)) else 0)
                slots = _running(slots)
            if _wanting(slots):
                runner.set_active([row is not None for row in slots])
                longest = max(row.length for row in slots if row is not None)
                pending = runner.step(plan, len(slots), longest)
                for row in slots:
                    if row is not None:
                        row.under_way += 1
                running.append(partial(self._collect, slots, plan, pending, limits))
            # A device that is a step ahead: a row that ends early is noticed one forward late, and that is not counted.
            yield from _read(running, runner.lag if _wanting(slots) else 0)
            slots = _running(slots)
        yield from _read(running, 0)

    def _admit(
        self,
        runner: Runner,
        places: list[int],
        joining: list[Row],
        slots: list[Row | None],
        prompts: Sequence[list[int]],
        limits: Limits,
        last: bool,
    ) -> Callable[[], list[Update]]:
        """Prefill waiting rows into free places, which they take at once; returns what says their first tokens."""
        started = time.perf_counter()
        ids = [row.answer.row for row in joining]
        places = places[: len(joining)]
        admitted = runner.admit([prompts[i] for i in ids], ids, places, self.planner.first(len(slots), last))
        for place, row in zip(places, joining, strict=True):
            slots[place], row.started, row.under_way = row, started, 1

        def first_tokens() -> list[Update]:
            tokens = admitted.tokens()
            for row in joining:
                row.under_way -= 1
            return [extend(row, [token], limits) for row, token in zip(joining, tokens, strict=True)]

        return first_tokens

    def _collect(self, slots: list[Row | None], plan: Plan, pending: Pending, limits: Limits) -> list[Update]:
        """What a forward gave the rows that were running when it began and have not ended since."""
        begun = [(row, gain) for row, gain in zip(slots, pending.get(), strict=True) if row is not None]
        for row, _ in begun:
            row.under_way -= 1
        gained = [(row, gain) for row, gain in begun if row.answer.finish_reason is None]
        if gained:
            self.planner.observe(plan, [gain for _, gain in gained])
        for row, gain in gained:
            row.length += len(gain.tokens)
        return [extend(row, gain.tokens, limits) for row, gain in gained]


def new_row(
    network: Network,
    tokenizer: PreTrainedTokenizerBase | None,
    index: int,
    prompt: list[int],
    limits: Limits,
    streaming: bool,
) -> Row:
    """A row that has not begun. Raises TidarError if there is no room for it."""
    stream = TextStream(tokenizer, limits.stop) if tokenizer is not None else None
    room = room_for(network, prompt, limits.max_new_tokens, index)
    return Row(Answer(index), stream, streaming or bool(limits.stop), room, len(prompt), 0.0)


def _read(running: deque[Callable[[], list[Update]]], most: int) -> Iterator[list[Update]]:
    """What forwards gave, until at most `most` of them are under way."""
    while len(running) > most:
        if updates := running.popleft()():
            yield updates


def _wanting(slots: list[Row | None]) -> bool:
    return any(row is not None and row.wants for row in slots)


def _running(slots: list[Row | None]) -> list[Row | None]:
    """The slots without the rows that have ended."""
    return [row if row is not None and row.answer.finish_reason is None else None for row in slots]


def room_for(network: Network, prompt: list[int], most: int, row: int) -> int:
    """New tokens that fit: at most `most`, or what the context leaves. Raises TidarError if there is no room."""
    if not prompt:
        raise TidarError(f"prompt {row + 1} is empty: give at least one token")
    context = network.max_positions
    if context is None:
        return most
    if len(prompt) >= context:
        raise TidarError(
            f"prompt {row + 1} has {len(prompt)} tokens, but the model's context is {context}: shorten it to leave room"
        )
    return min(most, context - len(prompt))


def extend(row: Row, tokens: list[int], limits: Limits, gained: int | None = None) -> Update:
    """Append a forward's tokens to a row's answer, up to what ends it.

    `gained` is what the forward decided, where that is not the tokens that are ready to be appended.
    """
    answer, stream = row.answer, row.stream
    tokens = tokens[: row.room - answer.new_tokens]
    if not limits.eos_ids.isdisjoint(tokens):
        tokens = tokens[: 1 + next(i for i, token in enumerate(tokens) if token in limits.eos_ids)]
        answer.finish_reason = "stop"
    if stream is not None and row.streaming:
        tokens = tokens[: stream.push(tokens)]
        if stream.stopped:
            answer.finish_reason = "stop"
    answer.forwards += 1
    answer.token_ids += tokens
    if gained is not None or answer.forwards > 1:
        answer.acceptance_lengths.append(len(tokens) if gained is None else gained)
    if answer.finish_reason is None and answer.new_tokens >= row.room:
        answer.finish_reason = "length"
    if answer.finish_reason is not None:
        answer.seconds = time.perf_counter() - row.started
    return Update(answer, tokens, _text(row) if stream is not None else "")


def _text(row: Row) -> str:
    """New text of a row, also put into its answer; all of it at the end, if nobody follows it."""
    answer, stream = row.answer, row.stream
    assert stream is not None
    ended = answer.finish_reason is not None
    if not ended and not row.streaming:
        return ""
    if not row.streaming:
        stream.push(answer.token_ids)
    if ended:
        stream.finish()
    text, answer.text = stream.take(), stream.text
    return text


def _compact(runner: Runner, state: State, slots: list[Row | None], plan: Plan) -> list[Row | None]:
    """Halve the batch once half of its places are free: less often would waste forwards, more often copies.

    To a size whose step is captured, or worth it; `plan` is the last one's, which most likely is the next one's.
    """
    alive = [slot for slot, row in enumerate(slots) if row is not None]
    if not alive:
        return slots
    size = runner.batch_for(len(alive))
    while size < len(slots) and not runner.shrinks(plan, len(slots), size):
        size *= 2
    if size * 2 > len(slots):
        return slots
    state.move_rows(torch.tensor(alive, device=state.drafts.device))
    return [slots[slot] for slot in alive] + [None] * (size - len(alive))
