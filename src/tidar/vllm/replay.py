"""Parts of a step that are many small kernels, as CUDA graphs: vLLM captures the model, they come before and after it.

Launched one by one from Python they would take longer than a small model's layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.vllm.shapes import MOST_TOKENS

logger = logging.getLogger(__name__)
Results = tuple[Tensor, ...]


@dataclass
class Recorded:
    """A graph, what it reads, and what it leaves; `fixed` are the addresses of what else it reads and writes."""

    graph: torch.cuda.CUDAGraph
    places: list[Tensor]
    results: Results
    fixed: tuple[int, ...]


class Replay:
    """Runs functions of tensors: the first time of a key as they are (kernels get compiled), then as a graph.

    Args:
        enabled: whether to record graphs at all; without, functions are just called.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.seen, self.recorded = set[Hashable](), dict[Hashable, Recorded]()
        if enabled:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(
        self,
        key: Hashable,
        function: Callable[..., Results],
        *inputs: Tensor,
        tokens: int,
        fixed: tuple[Tensor, ...] = (),
    ) -> Results:
        """`function(*inputs)`; what it gives holds until the next call with the same key.

        Args:
            key: says everything about the call that is not in tensors, and the tensors' shapes.
            function: may change tensors that outlive it, and must not ask the device anything.
            inputs: new in every call.
            tokens: of the step. Beyond MOST_TOKENS nothing is recorded: launches matter less there, memory more.
            fixed: what else the function reads or writes, in place: its batch, and what another graph has left. These
                are views that may move between calls; a graph is only for those that it was recorded with.
        """
        addresses = tuple(tensor.data_ptr() for tensor in fixed)
        held = self.recorded.get(key)
        if not self.enabled or tokens > MOST_TOKENS or (held is not None and held.fixed != addresses):
            return function(*inputs)
        if held is None:
            if key not in self.seen:
                self.seen.add(key)
                return function(*inputs)
            held = self._record(function, inputs, addresses)
            if held is None:
                return function(*inputs)
            self.recorded[key] = held
        for place, tensor in zip(held.places, inputs, strict=True):
            place.copy_(tensor)
        held.graph.replay()
        return held.results

    def _record(
        self, function: Callable[..., Results], inputs: tuple[Tensor, ...], addresses: tuple[int, ...]
    ) -> Recorded | None:
        """None if it cannot be recorded, which is logged; then nothing is recorded any more."""
        graph, own = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            places = [tensor.clone() for tensor in inputs]
            self.stream.wait_stream(own)
            with torch.cuda.stream(self.stream):
                # Other threads copy results to the host meanwhile.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    results = function(*places)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self.enabled = False
            logger.warning("tidar: parts of a step run without CUDA graphs, which is slower: %s", error)
            return None
        own.wait_stream(self.stream)
        return Recorded(graph, places, results, addresses)
