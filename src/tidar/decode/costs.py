"""What a forward costs on this machine: measured once per (machine, model, dtype, batch), then kept in a file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tidar import __version__
from tidar.decode.runner import Runner
from tidar.decode.step import Plan
from tidar.model.hub import cache_folder
from tidar.model.network import Network

PREFIX = 512
"""Cached tokens a row while measuring."""
REPEATS, PATIENCE = 7, 0.5
"""Steps timed for each plan, fewer once they took this many seconds."""
VERSION = 2
"""Of how costs are measured and what is measured; others' files are not read."""
MOST_TOKENS, MOST_TOKENS_CPU = 4096, 256
"""Forwards of more tokens than this are not considered: their slots are not free anywhere."""


class Costs:
    """Seconds a forward of a plan takes, for one network on its device. They are measured with the runner of a run."""

    def __init__(self, runner: Runner, remeasure: bool = False) -> None:
        self.runner, self.network = runner, runner.network
        captured = "-captured" if runner.captures else ""  # a graph has another price than the same forward alone
        self.path = cache_folder() / "costs" / f"{_fingerprint(self.network)}{captured}.json"
        self.known: dict[str, float] = {}
        self.changed = False
        if not remeasure:
            try:
                stored = {str(k): float(v) for k, v in json.loads(self.path.read_text())["seconds"].items()}
                # Zero stands for a plan that was not worth timing, which plain decoding ("1/0/0") never is.
                self.known = {k: v for k, v in stored.items() if 0 < v < math.inf or (v == 0 and " 1/0/0" not in k)}
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                self.known = {}  # a broken file is measured anew

    def of(self, plans: Sequence[Plan], rows: int) -> list[tuple[Plan, float]]:
        """(plan, seconds) of those that can pay; the rest would be slower than plain decoding at full acceptance.

        `plans` holds the plain one.
        """
        most = MOST_TOKENS if self.network.device.type == "cuda" else MOST_TOKENS_CPU
        ordered = sorted((p for p in plans if not p.drafting or rows * p.slots <= most), key=lambda plan: plan.slots)
        missing = [plan for plan in ordered if _name(plan, rows) not in self.known]
        if missing:
            self._measure(ordered, rows)
        costs = [(plan, self.known.get(_name(plan, rows), 0.0)) for plan in ordered]
        return [(plan, seconds) for plan, seconds in costs if seconds > 0]

    def _measure(self, ordered: Sequence[Plan], rows: int) -> None:
        if not self.changed:
            print("measuring what a forward costs on this machine (kept for the next time)", file=sys.stderr)
        self.changed = True
        plain = 0.0
        too_dear: dict[int, bool] = {}
        with _Bench(self.runner, max(ordered, key=lambda p: p.draft_length), rows) as bench:
            for plan in ordered:
                name = _name(plan, rows)
                if too_dear.get(plan.draft_length):
                    self.known[name] = 0.0
                    continue
                if name not in self.known:
                    self.known[name] = bench.seconds(plan)
                plain = plain or self.known[name]
                too_dear[plan.draft_length] = self.known[name] > plan.draft_length * plain

    def save(self) -> None:
        """Keep what was measured, where the cache folder can be written."""
        if not self.changed:
            return
        text = json.dumps({"network": _description(self.network), "seconds": self.known}, indent=1) + "\n"
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text)
            partial.replace(self.path)  # atomic: a reader sees the old file or the new one
        except OSError as error:
            print(f"measured costs cannot be kept ({error}); set TIDAR_CACHE to a writable folder", file=sys.stderr)


class _Bench:
    """A state of `rows` rows with a prefix, to time steps on."""

    def __init__(self, runner: Runner, longest: Plan, rows: int) -> None:
        self.runner, self.network, self.rows = runner, runner.network, rows
        limit = self.network.max_positions or 1 << 30
        self.prefix = min(PREFIX, limit // 2)
        room = self.prefix + (REPEATS + 2) * longest.draft_length + longest.draft_length * (longest.draft_length + 1)
        self.state = self.runner.prepare(rows, room, longest)

    def __enter__(self) -> _Bench:
        self.runner.set_active([True] * self.rows)
        return self

    def __exit__(self, *args: object) -> None:
        self.runner.set_active([False] * self.rows)

    @torch.inference_mode()
    def seconds(self, plan: Plan) -> float:
        """The fastest of a few steps, waiting for each: whatever else runs on the machine only ever adds time."""
        taken = list[float]()
        while len(taken) < 2 or (len(taken) <= REPEATS and sum(taken[1:]) < PATIENCE):
            self.state.cache.lengths.fill_(self.prefix)
            if self.network.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            self.runner.step(plan, self.rows, self.prefix).get()
            taken.append(time.perf_counter() - started)
        return min(taken[1:])


def _name(plan: Plan, rows: int) -> str:
    sampled = "" if plan.params.greedy else " sampled"
    return f"{rows} x {plan.draft_length}/{plan.blocks}/{len(plan.leaves)}{sampled}"


def _description(network: Network) -> dict[str, Any]:
    """What costs depend on."""
    device, config = network.device, network.lm.config.get_text_config().to_dict()
    sizes = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    drafter = network.drafter.spec._asdict() if network.drafter is not None else None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "model": {name: config.get(name) for name in (*sizes, "num_key_value_heads")},
        "drafter": drafter,
        "dtype": str(network.lm.dtype),
        "weights": network.weights,
        "torch": torch.__version__,
        "tidar": __version__,
        "version": VERSION,
    }


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _fingerprint(network: Network) -> str:
    return hashlib.sha256(json.dumps(_description(network), sort_keys=True).encode()).hexdigest()[:16]
