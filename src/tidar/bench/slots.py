"""The free-token-slots curve: how long a forward takes by the number of tokens in it, and what TiDAR's steps cost.

Reading the weights takes the same time for one token as for many, so up to some number tokens ride along for little.
Where that ends depends on machine, model and dtype; TiDAR lives on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tidar.bench import machine
from tidar.bench.shapes import cache_bytes, weight_bytes, weight_count
from tidar.decode.cache import RowCache
from tidar.decode.runner import GraphRunner, runner_for
from tidar.decode.step import Plan
from tidar.errors import memory_for
from tidar.layout import step_layout
from tidar.model.network import Network

STEPS = (
    *((1, 0, 0), (4, 4, 0), (8, 1, 0), (8, 3, 0), (8, 3, 16), (8, 7, 0), (8, 8, 0), (8, 8, 8)),
    *((16, 6, 0), (16, 6, 16), (16, 15, 0), (16, 16, 0)),
)
"""(draft length, outcomes, alternatives) of the steps that are timed whole: verifying, drafting and all."""


class Timed(NamedTuple):
    """Seconds of one pass, and of what had to come before: fusing, compiling, capturing, and a first pass."""

    seconds: float
    warm_up: float


@torch.inference_mode()
def time_forward(network: Network, tokens: int, prefix: int, rows: int = 1) -> Timed:
    """One forward with logits for all of its tokens, as a CUDA graph on a GPU."""
    started = time.perf_counter()
    runner, device = runner_for(network), network.device  # it fuses what can be fused
    cache = RowCache(rows, prefix + tokens, device)
    cache.lengths.fill_(prefix)
    ids = torch.arange(rows * tokens, device=device).view(rows, tokens) % network.vocabulary
    layout = step_layout(tokens, (), device).after(cache.lengths)
    cache.reserve(tokens)

    def work() -> torch.Tensor:
        return network.head(network(ids, layout, cache, fused=True))

    if not isinstance(runner, GraphRunner):
        return _timed(work, device, started, 5)
    graph, _ = runner.record(work, f"a forward of {tokens} tokens x {rows} rows")
    return _timed(graph.replay, device, started, 20)


@torch.inference_mode()
def time_step(network: Network, plan: Plan, prefix: int, rows: int = 1) -> Timed:
    """One whole decode step of `plan`, as the engine runs it."""
    started = time.perf_counter()
    runner = runner_for(network)
    state = runner.prepare(rows, prefix + 2 * plan.draft_length + plan.slots, plan)
    runner.set_active([True] * rows)

    in_a_row = 8 if network.device.type == "cuda" else 1  # the engine does not wait for each step either

    def work() -> None:
        for _ in range(in_a_row):
            state.cache.lengths.fill_(prefix)
            runner.step(plan, rows, prefix)

    timed = _timed(work, network.device, started, repeats=8 if in_a_row > 1 else 5)
    runner.set_active([False] * rows)
    return timed._replace(seconds=timed.seconds / in_a_row)


def _timed(work: Callable[[], object], device: torch.device, started: float, repeats: int) -> Timed:
    work()
    machine.wait(device)
    warm_up = time.perf_counter() - started
    return Timed(machine.median_seconds(work, device, repeats, warmups=1), warm_up)


def measure(
    network: Network, name: str, tokens: Sequence[int], prefixes: Sequence[int], rows: int
) -> Iterator[dict[str, Any]]:
    """Steps and curve for every prefix length, with the machine's ceilings; yields the result as it grows.

    `warm_up_s` of a step or forward is what its first use took, see `Timed`. Raises TidarError where memory ends.
    """
    device, dtype = network.device, network.lm.dtype
    bandwidth, flops = machine.read_bandwidth(device), machine.peak_flops(device, dtype)
    weights, curves = weight_bytes(network), list[dict[str, Any]]()
    result = {
        "conditions": machine.conditions(device, dtype),
        "model": name,
        "weights": network.weights,
        "drafter": network.drafter.spec._asdict() if network.drafter is not None else None,
        "rows": rows,
        "read_bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "matmul_tflops": round(flops / 1e12, 1),
        "weights_gb": round(weights / 1e9, 3),
        "curves": curves,
    }
    # A GPU's runner keeps the largest state that it had, and attention reads all of its room: short prefixes first.
    for prefix in sorted(set(prefixes)):
        read = weights + rows * cache_bytes(network, prefix)
        steps, points = list[dict[str, Any]](), list[dict[str, Any]]()
        curves.append({"prefix": prefix, "forward": points, "steps": steps})
        plans = [Plan(length, outcomes=outcomes, alternatives=leaves) for length, outcomes, leaves in STEPS]
        for plan in plans if network.can_draft else plans[:1]:
            with _memory_for(rows, prefix):
                timed = time_step(network, plan, prefix, rows)
            step = {
                "draft_length": plan.draft_length,
                "outcomes": plan.blocks,
                "alternatives": len(plan.leaves),
                "slots": plan.slots,
            } | _times(timed, read)
            step["ar_steps"] = round(step["ms"] / (steps or [step])[0]["ms"], 3)
            steps.append(step | {"share_of_bandwidth": round(read / timed.seconds / bandwidth, 3)})
            yield result
        for count in tokens:
            with _memory_for(rows, prefix):
                timed = time_forward(network, count, prefix, rows)
            products = 2 * weight_count(network) * count * rows
            roofline = max(read / bandwidth, products / flops)
            points.append({"tokens": count, **_times(timed, read), "roofline_ms": round(roofline * 1e3, 4)})
            yield result


def _memory_for(rows: int, prefix: int) -> AbstractContextManager[None]:
    advice = "lower --batch, --prefix or --tokens; what was measured so far is kept"
    return memory_for(f"batch {rows} and a prefix of {prefix}", advice)


def _times(timed: Timed, read: int) -> dict[str, float]:
    """Figures of a pass that reads so many bytes."""
    return {
        "ms": round(timed.seconds * 1e3, 4),
        "gb_per_s": round(read / timed.seconds / 1e9, 1),
        "warm_up_s": round(timed.warm_up, 3),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Latency against tokens in one forward, with the roofline."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for index, curve in enumerate(result["curves"]):
        points = curve["forward"]
        x, colour = [p["tokens"] for p in points], f"C{index}"
        axes.plot(x, [p["ms"] for p in points], "o-", color=colour, markersize=4, label=f"prefix {curve['prefix']:,}")
        axes.plot(x, [p["roofline_ms"] for p in points], "--", color=colour, linewidth=1, alpha=0.7)
    axes.plot([], [], "--", color="grey", linewidth=1, label="roofline")
    axes.set_xscale("log", base=2)
    ticks = [1 << n for n in range(x[-1].bit_length())]
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in one forward")
    axes.set_ylabel("milliseconds")
    first, conditions = result["curves"][0]["forward"][0], result["conditions"]
    axes.set_title(
        f"{result['model']}, {conditions['device']}, {machine.precision(result)}, batch {result['rows']}\n"
        f"1 token: {first['ms']:.2f} ms, {machine.rounded(first['gb_per_s'])} GB/s "
        f"of {machine.rounded(result['read_bandwidth_gb_per_s'])}",
        fontsize=9,
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
