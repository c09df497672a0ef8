"""What drafting achieves, on the server's /metrics page.

Steps leave their results on the device; they are read about once a second, one reading late, so no step waits for it.
Counters of all processes meet where PROMETHEUS_MULTIPROC_DIR says (`tidar serve` sets it).
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from prometheus_client import Counter
from torch import Tensor

from tidar.vllm.shapes import Curve, Shape

EVERY, MOST = 1.0, 256
"""Seconds, or steps, between readings."""
STEPS = Counter("tidar_steps", "Forwards of a request that verified and drafted.")
TOKENS = Counter("tidar_tokens", "Tokens that those forwards gained.")
MISSES = Counter("tidar_outcome_misses", "Forwards whose true outcome had no block of its own.")
JUDGED = Counter("tidar_judged", "Drafts that were judged, by place in the block.", ["position"])
ACCEPTED = Counter("tidar_accepted", "Drafts that stood, by place in the block.", ["position"])


class Gains(NamedTuple):
    """Of some requests' steps, each [n]: drafts that stood, drafts that there were, whether the outcome was pruned."""

    accepted: Tensor
    drafted: Tensor
    missed: Tensor


class Metrics:
    def __init__(self, curve: Curve, counts: bool = True) -> None:
        self.most, self.counts = curve.most_drafts, counts  # one of several GPUs counts, as all see the same
        self.steps = list[tuple[Tensor, Tensor]]()
        self.copied: tuple[Gains, torch.cuda.Event | None] | None = None
        self.read = time.monotonic()

    def record(self, shape: Shape, result: Tensor, anchors: Tensor) -> None:
        """A step's result [R, 3 + K] (see `kernels.judge.Decision`) and the anchors [R or 1, B] of its blocks."""
        if not self.counts:
            return
        # Now: the next step's anchors may lie where these do.
        hit = (anchors == result[:, :1] - 1).any(1) if shape.outcomes < shape.draft_length else result[:, 0] > 0
        self.steps.append((result[:, :2], hit))
        waits = result.is_cuda and len(self.steps) < MOST and time.monotonic() - self.read < EVERY
        if not waits:
            self._publish()
            self._copy(result.is_cuda)
            self.read = time.monotonic()
            if not result.is_cuda:
                self._publish()

    def _copy(self, asynchronous: bool) -> None:
        parts = [torch.cat((counts, (~hit).long()[:, None]), 1) for counts, hit in self.steps]
        columns = torch.cat(parts).T.to("cpu", non_blocking=True)
        event = torch.cuda.Event() if asynchronous else None
        if event is not None:
            event.record()
        self.steps, self.copied = [], (Gains(*columns), event)

    def _publish(self) -> None:
        if self.copied is None:
            return
        (accepted, drafted, missed), event = self.copied
        if event is not None:
            event.synchronize()
        STEPS.inc(len(accepted))
        TOKENS.inc(int(accepted.sum()))
        MISSES.inc(int(missed.sum()))
        for place in range(2, self.most + 1):  # the first draft is a token of the model already
            judged = (drafted >= place) & (accepted >= place - 1)
            JUDGED.labels(place).inc(int(judged.sum()))
            ACCEPTED.labels(place).inc(int((judged & (accepted >= place)).sum()))
        self.copied = None
