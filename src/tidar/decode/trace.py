"""What every forward of an answer did: the run's own numbers, for the demo page and `tidar trace`.

`trace` decodes as the engine does, by a runner that shows its forwards, and puts down what they computed. What went
into a decision is read, never decided again: visibility comes from the layout, verdicts from the step. Only the blocks
that were thrown away are turned into tokens for the trace alone; that comes last, so that nobody waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tidar.decode.engine import Answer, Engine, Limits, Update
from tidar.decode.record import (
    Committed,
    Discarded,
    Draft,
    End,
    Event,
    Guess,
    Leaf,
    Outcome,
    Picture,
    Source,
    Start,
    Step,
    Token,
    Verdict,
)
from tidar.decode.runner import Admitted, Pending, Runner, prepare_fused
from tidar.decode.step import GREEDY, Plan, Seen
from tidar.decode.text import TextStream
from tidar.layout import Layout
from tidar.model.network import Network
from tidar.sampling import outcome_probabilities


def trace(engine: Engine, prompt: list[int], limits: Limits, mode: str) -> Iterator[Event]:
    """Decode a prompt (token ids), telling what every forward did.

    Forwards run eagerly, on a GPU too, so that they can be seen.

    Raises:
        TidarError: as `Engine.run` does.
    """
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    runner = engine.runner = TracingRunner(engine.network, tokenizer)
    pieces = _Pieces(tokenizer, limits)
    pictures = 0
    yield Start(mode, [runner.token(t) for t in prompt])
    for (update,) in engine.run([prompt], limits):
        with runner.watch.paused():
            yield from runner.pictures[pictures:]
            pictures = len(runner.pictures)
            yield pieces.complete(runner.steps[-1], update)
            if engine.network.device.type == "cuda":  # soon done there, and states are best not kept
                yield from runner.discarded()
    yield _end(update.answer, runner.steps[-1].at)
    yield from runner.discarded()


def _end(answer: Answer, seconds: float) -> End:
    return End(
        answer.text,
        answer.token_ids,
        answer.forwards,
        answer.acceptance_lengths,
        answer.tokens_per_forward,
        seconds,
        answer.finish_reason,
    )


class _Pieces:
    """Cuts the answer's text into what each of its tokens added."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
        self.stream = TextStream(tokenizer, limits.stop)

    def complete(self, step: Step, update: Update) -> Step:
        """The step with the tokens that the answer kept, each with its piece."""
        kept, last = step.tokens[: len(update.token_ids)], len(update.token_ids) - 1
        ended = update.answer.finish_reason is not None
        return replace(step, tokens=[self._with_piece(t, ended and i == last) for i, t in enumerate(kept)])

    def _with_piece(self, token: Committed, last: bool) -> Committed:
        self.stream.push([token.id])
        if last:
            self.stream.finish()
        return replace(token, piece=self.stream.take())


class Stopwatch:
    """Seconds since it was started, without those that it was paused for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = self.lost = 0.0

    def start(self) -> None:
        self.started, self.lost = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started - self.lost

    @contextmanager
    def paused(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what is under way belongs to the run
        since = time.perf_counter()
        try:
            yield
        finally:
            self.lost += time.perf_counter() - since


@dataclass(frozen=True)
class _Thrown:
    """Blocks of a step, kept for later: hidden [blocks, K, H], and the verifier's favourite after each anchor."""

    plan: Plan
    hidden: Tensor
    favourites: Tensor


class TracingRunner(Runner):
    """An eager runner of one row that puts down every forward since the row was admitted."""

    def __init__(self, network: Network, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(network)
        prepare_fused(network)
        self.tokenizer = tokenizer
        self.watch = Stopwatch(network.device)
        self.steps: list[Step] = []
        self.pictures: list[Picture] = []
        self._thrown: dict[int, _Thrown] = {}
        self._places: dict[tuple, int] = {}
        self.prompt_length = 0

    def admit(self, prompts: list[list[int]], rows: list[int], places: list[int], plan: Plan) -> Admitted:
        self.prompt_length = len(prompts[0])
        self.observer = self._observe  # from here on: before, a planner may have measured with this runner
        self.watch.start()
        admitted = super().admit(prompts, rows, places, plan)
        admitted.tokens()
        self._finish()
        return admitted

    def step(self, plan: Plan, rows: int, longest: int) -> Pending:
        pending = super().step(plan, rows, longest)
        if self.steps:
            pending.arrived()
            self._finish()
        return pending

    def token(self, token_id: int) -> Token:
        return Token(token_id, self.text(token_id))

    def text(self, token_id: int) -> str:
        text = str(self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
        spelled = self.tokenizer.convert_ids_to_tokens(token_id)
        # Decoded alone, SentencePiece's tokens lose the space that they begin with.
        begins = isinstance(spelled, str) and spelled.startswith("▁") and not text.startswith(" ")
        return " " + text if begins else text

    def _observe(self, layout: Layout, seen: Seen) -> None:
        with self.watch.paused():
            self.steps.append(_Reader(self, layout, seen).step())

    def _finish(self) -> None:
        """Add what is known after a forward: the next drafts, and the time."""
        assert self.state is not None
        ended = self.watch.seconds
        with self.watch.paused():
            step = self.steps[-1]
            before = self.steps[-2].at if step.index else 0.0
            length = int(self.state.drafted[0].clamp(max=step.draft_length))
            sure = [None, *self.state.confidence[0, : length - 1].tolist()]
            ids = self.state.drafts[0, :length].tolist()
            drafts = [Guess(i, self.text(i), c) for i, c in zip(ids, sure, strict=True)]
            outcomes = [replace(o, tokens=drafts) if o.chosen else o for o in step.outcomes]
            self.steps[-1] = replace(step, at=ended, seconds=ended - before, outcomes=outcomes)

    def picture(self, layout: Layout, prompt: int, leaves: int) -> int:
        """Index of the layout's picture, which is made once."""
        key = (prompt, leaves, *(tuple(t[0].tolist()) for t in (layout.depth, layout.enter, layout.exit)))
        if key not in self._places:
            self._places[key] = len(self.pictures)
            self.pictures.append(draw(layout, prompt, leaves))
        return self._places[key]

    def keep(self, index: int, thrown: _Thrown) -> None:
        self._thrown[index] = thrown

    @torch.inference_mode()
    def discarded(self) -> Iterator[Discarded]:
        """What thrown away blocks had drafted, step by step."""
        kept, self._thrown = self._thrown, {}
        for index, thrown in kept.items():
            block, first = thrown.hidden, thrown.favourites
            logits = self.network.head(block[:, 1:])
            none = torch.full_like(first, -1)
            drafts = thrown.plan.propose(self.network, block, logits, first, none, GREEDY, None)
            guesses = [
                [Guess(i, self.text(i), c) for i, c in zip(ids, [None, *sure], strict=True)]
                for ids, sure in zip(drafts.drafts.tolist(), drafts.confidence.tolist(), strict=True)
            ]
            outcomes = self.steps[index].outcomes
            told = [o if o.chosen else replace(o, tokens=g) for o, g in zip(outcomes, guesses, strict=True)]
            yield Discarded(index, told)


class _Reader:
    """Reads one forward of row 0."""

    def __init__(self, runner: TracingRunner, layout: Layout, seen: Seen) -> None:
        self.runner, self.layout, self.seen = runner, layout, seen
        self.plan, self.judged, self.index = seen.plan, seen.judged, len(runner.steps)
        state, (accepted, drafted, known, *_) = seen.state, seen.decision.result[0, :3].tolist()
        self.accepted, self.drafted, self.known = int(accepted), int(drafted), int(known)
        self.ids = state.drafts[0, : self.judged].tolist()
        self.sure = state.confidence[0, : self.judged - 1].tolist()
        self.ar = seen.ar_logits[0].float().softmax(-1)
        # A prefill's plan may have leaves, but only steps verify any.
        self.leaf_count = len(self.plan.leaves) if self.index else 0

    def step(self) -> Step:
        drafts, following = self._drafts(), self._next()
        stood = [self._committed(i, d) for i, d in enumerate(drafts[: self.accepted]) if i]
        prefix = int(self.seen.state.cache.lengths[0])
        self._keep_blocks()
        return Step(
            index=self.index,
            seconds=0.0,
            at=0.0,
            draft_length=self.plan.draft_length,
            slots=self.layout.size,
            prefix=prefix,
            layout=self.runner.picture(self.layout, self._prompt, self.leaf_count),
            drafts=drafts if self.index else [],
            leaves=self._leaves(),
            accepted=self.accepted if self.index else 0,
            next=following,
            outcomes=self._outcomes(),
            tokens=[*stood, following],
        )

    @property
    def _prompt(self) -> int:
        """Tokens of the prompt among the forward's: all in a prefill, else none."""
        return 0 if self.index else self.runner.prompt_length

    def _drafts(self) -> list[Draft]:
        odds = self._odds()
        return [self._draft(i, token, odds[i]) for i, token in enumerate(self.ids)]

    def _draft(self, i: int, token: int, odds: float | None) -> Draft:
        text = self.runner.text(token)
        if i == 0:
            return Draft(token, text, "known")
        ar = float(self.ar[i - 1, token])
        if i < self.known:
            return Draft(token, text, "known", None, ar)
        verdict: Verdict = "stood" if i < self.accepted else "fell" if i == self.accepted else "behind"
        if i >= self.drafted:
            return Draft(token, text, "none")
        return Draft(token, text, verdict, self.sure[i - 1], ar, odds)

    def _odds(self) -> list[float | None]:
        """min(1, p / q) of each draft; None for all in greedy decoding."""
        q, params = self.seen.state.draft_probs, self.plan.params
        if q is None or self.judged == 1:
            return [None] * self.judged
        chosen = self.seen.state.drafts[:1, 1 : self.judged, None]
        p = params.probabilities(self.seen.logits[:1, : self.judged - 1]).gather(-1, chosen)[0, :, 0]
        drawn = (q.probs[:1, : self.judged - 1] * (q.ids[:1, : self.judged - 1] == chosen)).sum(-1)[0]
        return [None, *(p / drawn.clamp(min=1e-9)).clamp(max=1).tolist()]

    def _committed(self, i: int, draft: Draft) -> Committed:
        source: Source = "leaf" if i < self.known else "draft"
        assert draft.ar is not None
        return Committed(draft.id, draft.text, source, draft.ar, draft.confidence)

    def _next(self) -> Committed:
        token = int(self.seen.decision.next_token[0])
        source: Source = "first" if not self.index else "plain" if not self.plan.drafting else "bonus"
        if self.index and self.accepted < self.drafted:
            source = "correction"
        return Committed(token, self.runner.text(token), source, float(self.ar[self.accepted - 1, token]))

    def _leaves(self) -> list[Leaf]:
        if self.seen.leaves is None:
            return []
        tokens, parents = self.seen.leaves.tokens[0].tolist(), self.seen.leaves.parents.tolist()
        hit = int(self.seen.decision.next_token[0]) if int(self.seen.decision.after[0]) >= 0 else None
        return [
            Leaf(t, self.runner.text(t), p, t == hit and p == self.accepted - 1)
            for t, p in zip(tokens, parents, strict=True)
        ]

    def _outcomes(self) -> list[Outcome]:
        anchors, chosen = self._anchors(), self._chosen()
        likely: list[float] | None = None
        if self.index and self.judged > 1:
            confidence, drafted = self.seen.state.confidence[:1, : self.judged - 1], self.seen.state.drafted[:1]
            likely = outcome_probabilities(confidence, drafted.clamp(max=self.judged))[0].tolist()
        return [
            Outcome(anchor + 1 if self.index else 0, likely[anchor] if likely else None, block == chosen)
            for block, anchor in enumerate(anchors)
        ]

    def _anchors(self) -> list[int]:
        """The judged draft that each block continues; a prefill's one block continues the prompt."""
        anchors: list[int] = self.layout.anchors[0].tolist()
        return anchors if self.index else [0 for _ in anchors]

    def _chosen(self) -> int:
        """The block that drafts next, -1 if none does."""
        if not any(anchor < self.accepted for anchor in self._anchors()):
            return -1
        return (int(self.seen.decision.masks[0, 0]) - self.judged - self.leaf_count) // self.plan.draft_length

    def _keep_blocks(self) -> None:
        anchors = self._anchors()
        if len(anchors) <= (self._chosen() >= 0):
            return
        hidden = self.seen.hidden[0, -len(anchors) * self.plan.draft_length :]
        favourites = self.seen.logits[0, anchors].argmax(-1)
        block = hidden.view(len(anchors), self.plan.draft_length, -1).clone()
        self.runner.keep(self.index, _Thrown(self.plan, block, favourites))


def draw(layout: Layout, prompt: int, leaves: int) -> Picture:
    """The picture of row 0 of a layout whose first `prompt` tokens are one, and whose last clean ones are `leaves`."""
    clean, masks = layout.clean, layout.blocks * layout.block_size
    kinds = ["prompt"] * prompt + ["padding"] * (clean - prompt) if prompt else []
    kinds = kinds or ["draft"] * (clean - leaves) + ["leaf"] * leaves
    blocks = [-1] * clean + [block for block in range(layout.blocks) for _ in range(layout.block_size)]
    prefix = int(layout.prefix[0])
    visible = layout.dense_mask(prefix + layout.size)[0, 0]
    return Picture(
        kinds=kinds + ["mask"] * masks,
        blocks=blocks,
        depth=layout.depth[0].tolist(),
        sees=_ranges(visible[:, prefix:]),
        sees_prefix=visible[:, :prefix].all(1).tolist(),
    )


def _ranges(visible: Tensor) -> list[list[tuple[int, int]]]:
    """For each row of [N, N] bool its runs of True, as (first, end)."""
    edges = torch.nn.functional.pad(visible.to(torch.int8), (1, 1)).diff(dim=1)
    ranges: list[list[tuple[int, int]]] = [[] for _ in range(len(visible))]
    for (row, first), (_, end) in zip((edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist(), strict=True):
        ranges[row].append((first, end))
    return ranges
