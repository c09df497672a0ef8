"""What a step drafts, by how many requests are running: the planner's rule, without a clock inside the server.

More requests leave fewer slots free, so drafts get shorter and outcomes fewer until plain decoding is best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from tidar.decode.planner import expected_tokens
from tidar.errors import TidarError


class Shape(NamedTuple):
    """Draft length K and outcome blocks B of a step; Shape(1, 0) is plain decoding."""

    draft_length: int
    outcomes: int

    @property
    def slots(self) -> int:
        """Query tokens of a request in one forward."""
        return self.draft_length * (1 + self.outcomes)

    @property
    def drafting(self) -> bool:
        return self.draft_length > 1


PLAIN = Shape(1, 0)
COSTS = ((1, 1.0), (8, 1.05), (20, 1.07), (40, 1.10), (72, 1.14), (136, 1.25), (272, 1.65), (512, 2.41), (1024, 4.2))
"""(tokens in a forward, its time in units of one token's): Qwen3-8B in bfloat16 on an H100."""
MOST_TOKENS = 512
"""Larger steps do not draft: vLLM captures no graphs of them."""
SURVIVAL = 0.7
"""Guess of the probability that a draft stands, given the ones before it."""
READS = 3e12
"""Bytes of weights a second that the least of forwards reads, on that card."""
HOST = {False: (1.25e-3, 0.03e-3), True: (2.0e-3, 0.25e-3)}
"""Seconds that vLLM's host code takes for a step, and for each of its requests, plain and drafting: where weights are
few, steps take no less. From SmolLM2-135M on an H200 machine, prompts that join between drafting steps included. Hosts
differ: by the rates of runs since, a drafting step with one request took 1.7 ms and with four 2.9 (at e7a2f81,
results/serve-smollm2-135m-h200.json), or 2.7 and 3.8 (at a7bd0e9)."""
MARGIN = 1.25
"""Drafting must promise this much more than plain decoding: the costs know nothing of attention over long prefixes, of
prompts that join, and of steps for which there is no full graph."""


@dataclass(frozen=True)
class Curve:
    """Which shape is used up to how many running requests; above the last entry, plain decoding.

    steps: (most requests, shape), ascending. Raises TidarError for a curve that cannot be meant.
    """

    steps: tuple[tuple[int, Shape], ...]

    def __post_init__(self) -> None:
        limits = [limit for limit, _ in self.steps]
        if not self.steps or limits != sorted(set(limits)) or limits[0] < 1:
            raise TidarError(f"a curve needs ascending numbers of requests, at least 1, not {limits}")
        for _, (length, outcomes) in self.steps:
            if not 2 <= length <= 128 or not 1 <= outcomes <= length:
                raise TidarError(
                    f"a step cannot draft {length} tokens for {outcomes} outcomes: 2..128, and 1..{length}"
                )
        sizes = {shape.slots: shape for _, shape in self.steps}
        if len(sizes) != len({shape for _, shape in self.steps}):
            raise TidarError("two shapes of a curve have the same number of slots: change the outcomes of one")

    @staticmethod
    def parse(entries: Sequence[Sequence[int]]) -> Curve:
        """From [[most requests, draft length, outcomes], ...]."""
        if not all(len(entry) == 3 and all(isinstance(n, int) for n in entry) for entry in entries):
            raise TidarError(f"curve is {entries!r}, but must be [[requests, draft length, outcomes], ...]")
        return Curve(tuple((limit, Shape(length, outcomes)) for limit, length, outcomes in entries))

    @staticmethod
    def read(entries: Sequence[str]) -> Curve:
        """From texts "REQUESTS:K:OUTCOMES", as commands are given them."""
        try:
            numbers = [[int(part) for part in entry.split(":")] for entry in entries]
        except ValueError as error:
            raise TidarError(f"curve {' '.join(entries)!r} is not REQUESTS:K:OUTCOMES, as in 4:8:4") from error
        return Curve.parse(numbers)

    @property
    def entries(self) -> list[list[int]]:
        """What `parse` reads."""
        return [[limit, *shape] for limit, shape in self.steps]

    @property
    def longest(self) -> Shape:
        """The shape with the most slots."""
        return max((shape for _, shape in self.steps), key=lambda shape: shape.slots)

    @property
    def most_drafts(self) -> int:
        return max(shape.draft_length for _, shape in self.steps)

    def at(self, requests: int) -> Shape:
        """What a step over `requests` running requests drafts."""
        return next((shape for limit, shape in self.steps if requests <= limit), PLAIN)

    def of_slots(self, slots: int) -> Shape:
        """The shape with so many slots; plain decoding, if none has."""
        return next((shape for _, shape in self.steps if shape.slots == slots), PLAIN)


def choose_curve(
    shapes: Sequence[Shape],
    most_requests: int,
    costs: Sequence[tuple[int, float]] = COSTS,
    survival: float = SURVIVAL,
    weights: int | None = None,
) -> Curve | None:
    """For each number of requests the shape with the most expected tokens per second; None if drafting never pays.

    The rule: expected tokens of the shape, over what a forward of requests x slots tokens costs, or what the host needs
    for it. Drafting ends at the first number of requests where no shape of up to MOST_TOKENS tokens beats plain
    decoding by MARGIN.

    Args:
        shapes: to choose from.
        most_requests: up to how many requests.
        costs: (tokens in a forward, its time in units of one token's).
        survival: probability that a draft stands, given the ones before it.
        weights: bytes of the model's weights; None stands for so many that the host never matters.
    """
    longest = max(shape.draft_length for shape in shapes)
    gains = expected_tokens([survival] * (longest - 1), [(*shape, 0) for shape in shapes])
    tokens, seconds = (np.array(column, dtype=float) for column in zip(*costs, strict=True))

    def cost(requests: int, count: int, drafting: bool) -> float:
        """Of a step of `count` tokens, in units of one token's forward."""
        beyond = max(count - tokens[-1], 0) * seconds[-1] / tokens[-1]  # compute-bound: in proportion
        device = float(np.interp(count, tokens, seconds) + beyond)
        if weights is None:
            return device
        step, request = HOST[drafting]
        return max(device, (step + requests * request) * READS / weights)

    chosen = list[Shape]()
    for requests in range(1, most_requests + 1):
        sizes = [requests * shape.slots for shape in shapes]
        rates = [
            gain / cost(requests, n, True) if n <= MOST_TOKENS else 0.0 for gain, n in zip(gains, sizes, strict=True)
        ]
        best = int(np.argmax(rates))
        if rates[best] * cost(requests, requests, False) < MARGIN:
            break
        chosen.append(shapes[best])
    runs = [(shape, len(list(run))) for shape, run in groupby(chosen)]
    limits = np.cumsum([count for _, count in runs]).tolist()
    return Curve(tuple((limit, shape) for limit, (shape, _) in zip(limits, runs, strict=True))) if runs else None
