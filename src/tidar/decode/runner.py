"""Runs steps over one batch's state: eagerly on any device, as captured CUDA graphs on a GPU.

A runner keeps its buffers and graphs between runs, so that only the first answer pays for capturing (and compiling
kernels, which Triton keeps on disk).
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tidar.decode.cache import RowCache
from tidar.decode.step import Plan, State, StepResult, step
from tidar.layout import prefill_layout
from tidar.model.network import Network

FUSED_ERROR, FUSED_ERROR_16_BIT = 1e-3, 0.05
"""Relative difference of the median final state that rounding explains."""
MOST_GRAPHS = 256
"""Captured steps that are kept; a server may be asked for any number of temperatures."""
CAPACITY = 1024
"""Cache room on a GPU comes in multiples of this, so that the next run's prompts fit as well."""


class Pending:
    """A step's result, perhaps still on its way to the host."""

    def __init__(self, packed: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        self.host = packed
        if packed.is_cuda:
            self.host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self.host.copy_(packed, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def get(self) -> list[Gain]:
        """What each row gained; waits if it must."""
        if self.event is not None:
            self.event.synchronize()
        return [Gain(drafted, tokens[:accepted]) for accepted, drafted, *tokens in self.host.tolist()]


def pack(result: StepResult) -> Tensor:
    """[B, 2 + K]: accepted, drafted, new tokens; one tensor is one copy to the host."""
    return torch.cat((result.accepted[:, None], result.drafted[:, None], result.new), 1)


class Gain(NamedTuple):
    """A row's share of a step: drafts that were judged, and the new tokens."""

    drafted: int
    tokens: list[int]


class Runner:
    """Steps of one network over one state. The eager runner; see `GraphRunner` for the fast one."""

    lag = 0
    """Forwards that are under way before the first of them is read back."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.state: State | None = None
        self.active: list[bool] = []
        self.busy = False

    def prepare(self, rows: int, capacity: int, plan: Plan) -> State:
        """A state for a new run, of at least this size; no row is active."""
        self.active = []
        self.state = State.empty(rows, capacity, plan.draft_length, self.network, not plan.params.greedy)
        return self.state

    def batch_for(self, rows: int) -> int:
        """Batch size that `rows` running rows should be compacted to."""
        return rows

    @torch.inference_mode()
    def set_active(self, active: list[bool]) -> None:
        """Say which of the first rows run."""
        assert self.state is not None
        if active != self.active:
            self.state.active[: len(active)] = torch.tensor(active, device=self.state.active.device)
            self.active = list(active)

    def put_rows(self, places: list[int], joined: State) -> None:
        """Let the rows of `joined` run in `places`."""
        assert self.state is not None
        self.state.put_rows(torch.tensor(places, device=self.state.active.device), joined)
        self.active = []  # they are active on the device, whatever was said last

    def step(self, plan: Plan, rows: int, longest: int) -> Pending:
        """One forward over the first `rows` rows; `longest` is the largest of their lengths, known as nothing lags."""
        assert self.state is not None
        return Pending(pack(step(self.network, self.state.first(rows), plan, longest)))


class GraphRunner(Runner):
    """Every (plan, batch size) is captured once as a CUDA graph and then replayed."""

    lag = 1

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.graphs: dict[tuple[Plan, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()  # graphs never run at the same time, so they can share memory

    @torch.inference_mode()
    def prepare(self, rows: int, capacity: int, plan: Plan) -> State:
        held, sampled = self.state, not plan.params.greedy
        self.active = []
        if (
            held is not None
            and rows <= len(held.drafts)
            and capacity <= held.cache.capacity
            and plan.draft_length <= held.drafts.shape[1]
            and sampled == (held.draft_probs is not None)
        ):
            held.active.zero_()
            return held
        length = plan.draft_length if held is None else max(plan.draft_length, held.drafts.shape[1])
        self._forget()
        self.state = held = None  # its memory first
        capacity = -(-capacity // CAPACITY) * CAPACITY
        self.state = State.empty(rows, capacity, length, self.network, sampled)
        step(self.network, self.state, replace(plan, draft_length=1))  # makes the cache's tensors
        return self.state

    def batch_for(self, rows: int) -> int:
        return 1 << max(0, rows - 1).bit_length()

    @torch.inference_mode()
    def step(self, plan: Plan, rows: int, longest: int) -> Pending:
        key = plan.key, rows
        if key not in self.graphs:
            if len(self.graphs) >= MOST_GRAPHS:
                self._forget()
            self.graphs[key] = self._capture(plan, rows)
        graph, result = self.graphs[key]
        graph.replay()
        return Pending(result)

    def _forget(self) -> None:
        torch.cuda.synchronize()  # the last run's last step may still be replaying
        self.graphs.clear()
        self.pool = torch.cuda.graph_pool_handle()

    def _capture(self, plan: Plan, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        assert self.state is not None
        state, started = self.state.first(rows), time.perf_counter()
        kept = [tensor.clone() for tensor in (state.cache.lengths, *state.tensors())]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(self.network, state, plan)  # compiles kernels and makes the libraries' workspaces
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = pack(step(self.network, state, plan))
        for tensor, value in zip((state.cache.lengths, *state.tensors()), kept, strict=True):
            tensor.copy_(value)
        torch.cuda.synchronize()
        if (seconds := time.perf_counter() - started) > 2:
            print(f"captured a step of {plan.slots} slots x {rows} rows in {seconds:.1f} s", file=sys.stderr)
        return graph, result


def runner_for(network: Network) -> Runner:
    """The runner of a network: kept with it on a GPU, a new one elsewhere, or while that one is in use.

    Whatever was built from the network's weights is built again if they have changed.
    """
    if network.device.type in ("cpu", "cuda") and network.fused_from != network.state():
        network.fused = network.runner = None
        fuse(network)
        network.fused_from = network.state()
    if network.device.type != "cuda":
        return Runner(network)
    if not isinstance(network.runner, GraphRunner):
        network.runner = GraphRunner(network)
    return GraphRunner(network) if network.runner.busy else network.runner


def release(network: Network) -> None:
    """Give back the memory of everything that was built for decoding: caches, graphs, fused weights."""
    network.fused = network.runner = network.fused_from = None
    if network.device.type == "cuda":
        torch.cuda.synchronize()  # the last step may still be replaying
        gc.collect()
        torch.cuda.empty_cache()


@torch.inference_mode()
def fuse(network: Network) -> None:
    """Give the network its fused backbone, if it has one that says the same as the stock modules on a few tokens."""
    fused = network.build_fused()
    if fused is None:
        return
    device = network.device
    # From all over the vocabulary: its first tokens are often special, and a row of those is mostly rounding.
    ids = torch.arange(1, 49, device=device)[None] * 7919 % network.vocabulary
    layout = prefill_layout(torch.tensor([48], device=device), 48, 4 if network.can_draft else 0)
    said = []
    for network.fused in (None, fused):
        cache = RowCache(1, layout.size, device)
        cache.reserve(layout.size)
        said.append(network(ids, layout, cache, fused=True)[0].double())
    error = (said[0] - said[1]).norm(dim=-1) / said[0].norm(dim=-1)
    if not error.median() < (FUSED_ERROR if network.lm.dtype.itemsize > 2 else FUSED_ERROR_16_BIT):
        network.fused = None
