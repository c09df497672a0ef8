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
from tidar.sampling import Sampling, SamplingParams

PREFIX = 512
"""Cached tokens a row while measuring."""
REPEATS, PATIENCE = 7, 0.5
"""Samples of each plan, fewer once they took this many seconds; and the most steps of a sample."""
SAMPLE = 0.1
"""Seconds that a sample lasts, if that many steps do: what disturbs a machine now and then would else spare the fastest
of short steps, but no long one, and make drafting look dearer than it is."""
ROUNDS = 2
"""How often they are timed together, where steps are launched ahead of their results."""
VERSION = 4
"""Of how costs are measured and what is measured; others' files are not read."""
MOST_TOKENS, MOST_TOKENS_CPU = 4096, 256
"""Forwards of more tokens than this are not considered: their slots are not free anywhere."""


class Costs:
    """Seconds a forward of a plan takes, for one network on its device. They are measured with the runner of a run."""

    def __init__(self, runner: Runner, remeasure: bool = False) -> None:
        self.runner, self.network = runner, runner.network
        captured = "-captured" if runner.captures else ""  # a graph has another price than the same forward alone
        self.path = cache_folder() / "costs" / f"{_fingerprint(self.network)}{captured}.json"
        self.known: dict[str, float] = {} if remeasure else self._stored()
        self.measured: dict[str, float] = {}
        self.keeps = True

    def _stored(self) -> dict[str, float]:
        try:
            stored = {str(k): float(v) for k, v in json.loads(self.path.read_text())["seconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # a broken file is measured anew
        # Zero stands for a plan that was not worth timing, which plain decoding ("1/0/0") never is.
        return {k: v for k, v in stored.items() if 0 < v < math.inf or (v == 0 and " 1/0/0" not in k)}

    def of(self, plans: Sequence[Plan], rows: int) -> list[tuple[Plan, float]]:
        """(plan, seconds) of those that can pay; the rest would be slower than plain decoding at full acceptance.

        What is measured is kept at once, so that nothing is measured twice if somebody ends the program meanwhile.

        `plans` holds the plain one.
        """
        most = MOST_TOKENS if self.network.device.type == "cuda" else MOST_TOKENS_CPU
        ordered = sorted((p for p in plans if not p.drafting or rows * p.slots <= most), key=lambda plan: plan.slots)
        if any(_name(plan, rows) not in self.known for plan in ordered):
            try:
                self._measure(ordered, rows)
            finally:
                self._save()
        costs = [(plan, self.known.get(_name(plan, rows), 0.0)) for plan in ordered]
        plain = next(seconds for plan, seconds in costs if not plan.drafting)
        return [(plan, seconds) for plan, seconds in costs if 0 < seconds <= plan.draft_length * plain]

    def _measure(self, ordered: Sequence[Plan], rows: int) -> None:
        if not self.measured:
            print("measuring what a forward costs on this machine (kept for the next time)", file=sys.stderr)
        plain = 0.0
        too_dear = set[int]()  # draft lengths: more slots would be dearer still
        with _Bench(self.runner, max(ordered, key=lambda p: p.draft_length), rows) as bench:
            for plan in ordered:
                name = _name(plan, rows)
                if name not in self.known:
                    seconds = 0.0 if plan.draft_length in too_dear else bench.seconds(plan)
                    self.known[name] = self.measured[name] = seconds
                plain = plain or self.known[name]
                if self.known[name] > plan.draft_length * plain:
                    too_dear.add(plan.draft_length)

    def _save(self) -> None:
        """Keep what was measured beside what others have by now, where the cache folder can be written."""
        if not self.keeps:
            return
        seconds = self._stored() | self.measured
        text = json.dumps({"network": _description(self.network), "seconds": seconds}, indent=1) + "\n"
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text)
            partial.replace(self.path)  # atomic: a reader sees the old file or the new one
        except OSError as error:
            self.keeps = False
            print(f"measured costs cannot be kept ({error}); set TIDAR_CACHE to a writable folder", file=sys.stderr)


class _Bench:
    """A state of `rows` rows with a prefix, to time steps on."""

    def __init__(self, runner: Runner, longest: Plan, rows: int) -> None:
        self.runner, self.network, self.rows = runner, runner.network, rows
        room = (REPEATS + 2) * longest.draft_length + longest.draft_length * (longest.draft_length + 1)
        self.prefix = min(PREFIX, max(1, (self.network.max_positions or 1 << 30) - room))
        self.state = self.runner.prepare(rows, self.prefix + room, longest)

    def __enter__(self) -> _Bench:
        self.runner.set_active([True] * self.rows)
        return self

    def __exit__(self, *args: object) -> None:
        self.runner.set_active([False] * self.rows)

    @torch.inference_mode()
    def seconds(self, plan: Plan) -> float:
        """The fastest of a few steps: whatever else runs on the machine only ever adds time."""
        self._together(plan, 1)  # compiles, or captures
        if self.runner.lag:
            return min(self._together(plan, REPEATS) for _ in range(ROUNDS))
        taken, steps = [self._together(plan, 1)], 1
        while len(taken) < REPEATS and steps * sum(taken) < PATIENCE:
            steps = min(REPEATS, math.ceil(SAMPLE / min(taken)))
            taken.append(self._together(plan, steps))
        return min(taken[1:] or taken)

    def _together(self, plan: Plan, count: int) -> float:
        """Seconds a step of `count` that are launched as a run launches them: ahead of their results, if it does."""
        self.state.cache.lengths.fill_(self.prefix)
        if self.network.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        steps = [self.runner.step(plan, self.rows, self.prefix) for _ in range(count)]
        steps[-1].get()
        return (time.perf_counter() - started) / count


def _name(plan: Plan, rows: int) -> str:
    return f"{rows} x {plan.draft_length}/{plan.blocks}/{len(plan.leaves)}{_choice(plan.params)}"


def _choice(params: Sampling) -> str:
    """How tokens are chosen, as far as that costs time: truncation may sort the vocabulary for every token judged."""
    if params.greedy:
        return ""
    assert isinstance(params, SamplingParams)  # a planner's rows are all sampled in one way
    truncations = {"top-k": params.top_k, "top-p": params.top_p, "min-p": params.min_p}
    return " sampled" + "".join(f" {name}" for name, value in truncations.items() if value is not None)


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
