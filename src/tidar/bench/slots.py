"""The free-token-slots curve: how long a forward takes by the number of tokens in it, and what TiDAR's steps cost.

Reading the weights takes the same time for one token as for many, so up to some number tokens ride along for little.
Where that ends depends on machine, model and dtype; TiDAR lives on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tidar.bench import machine
from tidar.bench.shapes import cache_bytes, weight_bytes, weight_count
from tidar.decode.cache import RowCache
from tidar.decode.runner import runner_for
from tidar.decode.step import Plan
from tidar.layout import step_layout
from tidar.model.network import Network

STEPS = (
    *((1, 0, 0), (4, 4, 0), (8, 1, 0), (8, 3, 0), (8, 3, 16), (8, 7, 0), (8, 8, 0), (8, 8, 8)),
    *((16, 6, 0), (16, 6, 16), (16, 15, 0), (16, 16, 0)),
)
"""(draft length, outcomes, alternatives) of the steps that are timed whole: verifying, drafting and all."""


@torch.inference_mode()
def forward_seconds(network: Network, tokens: int, prefix: int, rows: int = 1) -> float:
    """Time of one forward with logits for all of its tokens, as a CUDA graph on a GPU."""
    runner_for(network)  # fuses what can be fused
    device = network.device
    cache = RowCache(rows, prefix + tokens, device)
    cache.lengths.fill_(prefix)
    ids = torch.arange(rows * tokens, device=device).view(rows, tokens) % network.vocabulary
    layout = step_layout(tokens, (), device).after(cache.lengths)
    cache.reserve(tokens)

    def work() -> torch.Tensor:
        return network.head(network(ids, layout, cache, fused=True))

    if device.type != "cuda":
        return machine.median_seconds(work, device, repeats=5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return machine.median_seconds(graph.replay, device, repeats=20)


@torch.inference_mode()
def step_seconds(network: Network, plan: Plan, prefix: int, rows: int = 1) -> float:
    """Time of one whole decode step of `plan`, as the engine runs it."""
    runner = runner_for(network)
    state = runner.prepare(rows, prefix + 2 * plan.draft_length + plan.slots, plan)
    runner.set_active([True] * rows)

    in_a_row = 8 if network.device.type == "cuda" else 1  # the engine does not wait for each step either

    def work() -> None:
        for _ in range(in_a_row):
            state.cache.lengths.fill_(prefix)
            runner.step(plan, rows, prefix)

    seconds = machine.median_seconds(work, network.device, repeats=8 if in_a_row > 1 else 5)
    runner.set_active([False] * rows)
    return seconds / in_a_row


def measure(
    network: Network, name: str, tokens: Sequence[int], prefixes: Sequence[int], rows: int
) -> Iterator[dict[str, Any]]:
    """Steps and curve for every prefix length, with the machine's ceilings; yields the result as it grows."""
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
    for prefix in prefixes:
        read = weights + rows * cache_bytes(network, prefix)
        steps, points = list[dict[str, Any]](), list[dict[str, Any]]()
        curves.append({"prefix": prefix, "forward": points, "steps": steps})
        plans = [Plan(length, outcomes=outcomes, alternatives=leaves) for length, outcomes, leaves in STEPS]
        for plan in plans if network.can_draft else plans[:1]:
            seconds = step_seconds(network, plan, prefix, rows)
            step = {
                "draft_length": plan.draft_length,
                "outcomes": plan.blocks,
                "alternatives": len(plan.leaves),
                "slots": plan.slots,
                "ms": round(seconds * 1e3, 4),
            }
            step["ar_steps"] = round(step["ms"] / (steps or [step])[0]["ms"], 3)
            steps.append(step | {"share_of_bandwidth": round(read / seconds / bandwidth, 3)})
            yield result
        for count in tokens:
            seconds = forward_seconds(network, count, prefix, rows)
            products = 2 * weight_count(network) * count * rows
            point = {
                "tokens": count,
                "ms": round(seconds * 1e3, 4),
                "gb_per_s": round(read / seconds / 1e9, 1),
                "roofline_ms": round(max(read / bandwidth, products / flops) * 1e3, 4),
            }
            points.append(point)
            yield result


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
        f"1 token: {first['ms']:.2f} ms, {first['gb_per_s']:,.0f} GB/s of {result['read_bandwidth_gb_per_s']:,.0f}",
        fontsize=9,
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
