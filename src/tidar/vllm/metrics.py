"""What drafting achieves, on the server's /metrics page.

Steps leave their results on the device; they are read about once a second, one reading late, so no step waits for it,
and what is left once no more steps come.
Counters of all processes meet where PROMETHEUS_MULTIPROC_DIR says (`tidar serve` sets it).
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

import torch
from prometheus_client import Counter
from torch import Tensor

from tidar.vllm.shapes import Curve

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
    """Counts steps whose results lie on `device`; of several GPUs one `counts`, as all see the same."""

    def __init__(self, curve: Curve, device: torch.device, counts: bool = True) -> None:
        self.most, self.counts, self.late = curve.most_drafts, counts, device.type == "cuda"
        self.steps = list[Tensor]()
        self.copied: tuple[Gains, torch.cuda.Event | None] | None = None
        self.read = self.recorded = time.monotonic()
        self.lock, self.device = threading.Lock(), device
        if self.late and counts:
            self.done = torch.cuda.Event()
            threading.Thread(target=self._follow, name="tidar-metrics", daemon=True).start()

    def record(self, counts: Tensor) -> None:
        """A step's counts [4, R], see `step.Told`."""
        if not self.counts:
            return
        with self.lock:
            self.steps.append(counts)
            if not self.late:
                self._read_all()
                return
            self.recorded = time.monotonic()
            self.done.record()
            if len(self.steps) >= MOST or self.recorded - self.read >= EVERY:
                self._publish()
                self._copy(asynchronous=True)
                self.read = self.recorded

    def _follow(self) -> None:
        """Reads the rest when no step has come for a while, from a thread of its own: then nobody is held up."""
        torch.cuda.set_device(self.device)
        while True:
            time.sleep(EVERY)
            with self.lock:
                waits = self.steps or self.copied is not None
                if waits and time.monotonic() - self.recorded >= EVERY:
                    self.done.synchronize()
                    self._read_all()

    def _read_all(self) -> None:
        self._publish()
        if held := self.steps:  # until they are read: their memory belongs to another stream
            self._copy(asynchronous=self.late)
            self._publish()
            held.clear()

    def _copy(self, asynchronous: bool) -> None:
        accepted, _, drafted, missed = torch.cat(self.steps, 1).to("cpu", non_blocking=True)
        event = torch.cuda.Event() if asynchronous else None
        if event is not None:
            event.record()
        self.steps, self.copied = [], (Gains(accepted, drafted, missed), event)

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
