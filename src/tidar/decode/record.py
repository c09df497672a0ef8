"""What a trace holds: an answer as events, each plain data. `trace.py` makes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

Verdict = Literal["known", "stood", "fell", "behind", "none"]
"""Of a draft: decided before; stood; fell; behind one that fell; no draft at all, only its slot."""
Source = Literal["first", "plain", "draft", "leaf", "correction", "bonus"]
"""Where a token of the answer came from: the prefill, plain decoding, a draft that stood, a leaf that was hit, the
verifier after a draft that fell, or the verifier after drafts that all stood."""


@dataclass(frozen=True)
class Token:
    """A token id and its text alone, special tokens included."""

    id: int
    text: str


@dataclass(frozen=True)
class Draft(Token):
    """A draft that went into a forward.

    confidence: the drafter's probability of it (before temperature); None for a token that was decided before.
    ar: the AR half's probability of it after the drafts before it (before temperature); None for the first, whose
    probability the forward before has told. odds: min(1, p / q), the probability that it stands, where tokens are
    sampled.
    """

    verdict: Verdict
    confidence: float | None = None
    ar: float | None = None
    odds: float | None = None


@dataclass(frozen=True)
class Leaf(Token):
    """An alternative to draft `after` + 1, verified beside it; hit: the verifier chose it."""

    after: int
    hit: bool


@dataclass(frozen=True)
class Guess(Token):
    """A token that an outcome block drafted; the first is the verifier's own and has no confidence."""

    confidence: float | None


@dataclass(frozen=True)
class Outcome:
    """A block that was drafted for the outcome "`accepted` drafts stand".

    probability: of that outcome, by the drafter's confidences, before the forward; None where nothing was drafted.
    chosen: whether it drafts next. tokens: its drafts. In a block that was thrown away they follow the token that the
    verifier likes best after draft `accepted`, and are None until the run has ended.
    """

    accepted: int
    probability: float | None
    chosen: bool
    tokens: list[Guess] | None = None


@dataclass(frozen=True)
class Committed(Token):
    """A token of the answer.

    piece: what it adds to the answer's text. ar: the AR half's probability of it; confidence: the drafter's, where it
    was drafted (both before temperature).
    """

    source: Source
    ar: float
    confidence: float | None = None
    piece: str = ""


@dataclass(frozen=True)
class Picture:
    """A forward's layout, as `layout.py` has it; what it looks like behind any prefix.

    kinds: of each slot, "prompt", "draft", "leaf", "mask" or "padding". blocks: the outcome block of each slot, -1 for
    none. depth: position of each slot behind the prefix. sees: for each slot the slots that it sees, as [first, end).
    sees_prefix: whether it sees all of the prefix.
    """

    event: ClassVar[str] = "layout"
    kinds: list[str]
    blocks: list[int]
    depth: list[int]
    sees: list[list[tuple[int, int]]]
    sees_prefix: list[bool]


@dataclass(frozen=True)
class Start:
    """A run begins: its prompt, and what its forwards may do."""

    event: ClassVar[str] = "start"
    mode: str
    prompt: list[Token]


@dataclass(frozen=True)
class Step:
    """One forward.

    index: 0 is the prefill. seconds: what it took; at: seconds from the start of the prefill to its end. draft_length,
    slots: of its plan; prefix: tokens in the cache before it. layout: which picture of the run. accepted: drafts that
    stood (the first always does). next: the verifier's own token. tokens: what it added to the answer, which may end
    before `next`.
    """

    event: ClassVar[str] = "step"
    index: int
    seconds: float
    at: float
    draft_length: int
    slots: int
    prefix: int
    layout: int
    drafts: list[Draft]
    leaves: list[Leaf]
    accepted: int
    next: Committed
    outcomes: list[Outcome]
    tokens: list[Committed] = field(default_factory=list)


@dataclass(frozen=True)
class End:
    """The run has ended. seconds: decoding alone, without what tracing it took."""

    event: ClassVar[str] = "end"
    text: str
    token_ids: list[int]
    forwards: int
    acceptance_lengths: list[int]
    tokens_per_forward: float
    seconds: float
    finish_reason: str | None


@dataclass(frozen=True)
class Discarded:
    """What the blocks of step `index` that were thrown away had drafted: all outcomes of the step."""

    event: ClassVar[str] = "discarded"
    index: int
    outcomes: list[Outcome]


Event = Start | Picture | Step | End | Discarded


def gather(events: Iterable[Event]) -> dict[str, Any]:
    """A run as plain data: its start and end, `layouts` and `steps`."""
    run: dict[str, Any] = {"layouts": [], "steps": []}
    for event in events:
        entry = asdict(event)
        match event:
            case Picture():
                run["layouts"].append(entry)
            case Step():
                run["steps"].append(entry)
            case Discarded():
                run["steps"][event.index]["outcomes"] = entry["outcomes"]
            case Start() | End():
                run.update(entry)
    return run
