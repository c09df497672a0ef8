"""Decoding block-diffusion checkpoints: masks of one block become tokens over several forwards, then the next block.

The baseline of the paper's Table 4 (BD3-LM, arXiv 2503.09573; decoders as in LLaDA, arXiv 2502.09992, and Fast-dLLM,
arXiv 2505.22618). Text is tiled by K from the prompt's start, as training tiles a row; the tile in which a prompt ends
is a block that shows what there is of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tidar.decode.denoise import BlockState, denoise, denoise_prefill
from tidar.decode.engine import Limits, Row, Update, extend, new_row
from tidar.decode.runner import MOST_GRAPHS, Captured, GraphRunner, power_of_two, prepare_fused, roomy_capacity
from tidar.errors import TidarError
from tidar.model.network import MASKED, Network
from tidar.sampling import Reveal, SamplingParams


class Denoiser:
    """Forwards over one batch, launched one by one."""

    def __init__(self, network: Network, reveal: Reveal, params: SamplingParams) -> None:
        self.network, self.reveal, self.params = network, reveal, params
        self.state: BlockState | None = None

    def start(
        self, prompts: Sequence[list[int]], rows: Sequence[int], room: Sequence[int], eos_ids: frozenset[int]
    ) -> Tensor:
        """Begin a batch; arguments and result as in `denoise_prefill`."""
        self.state, result = denoise_prefill(self.network, prompts, rows, room, eos_ids, self.reveal, self.params)
        return result

    def step(self, finished: bool, longest: int) -> Tensor:
        """The next forward, see `denoise`."""
        assert self.state is not None
        return denoise(self.network, self.state, self.reveal, self.params, finished, longest)

    def keep(self, alive: list[int]) -> list[int]:
        """Only the rows `alive` go on; returns the rows that the next results are about, by their present numbers."""
        assert self.state is not None
        self.state.move_rows(torch.tensor(alive, device=self.state.active.device))
        self.state = self.state.first(len(alive))
        return alive


class GraphDenoiser(Denoiser):
    """Every (rows, decoder, sampling) is captured once as a CUDA graph. Prefills are not, nor do batches shrink.

    It is kept with the network, as captured steps of drafting models are.
    """

    def __init__(self, network: Network, recorder: GraphRunner) -> None:
        super().__init__(network, Reveal(), SamplingParams())
        self.recorder = recorder
        self.held: BlockState | None = None
        self.graphs: dict[tuple, Captured] = {}

    def start(
        self, prompts: Sequence[list[int]], rows: Sequence[int], room: Sequence[int], eos_ids: frozenset[int]
    ) -> Tensor:
        result = super().start(prompts, rows, room, eos_ids)
        joined, held = self.state, self.held
        assert joined is not None
        if (
            held is None
            or len(held.active) < len(prompts)
            or held.cache.capacity < joined.cache.capacity
            or held.eos_ids.tolist() != sorted(eos_ids)
        ):
            self.graphs.clear()
            self.recorder.forget()
            self.held = held = None  # its memory first
            count, size = power_of_two(len(prompts)), joined.block.shape[1]
            capacity = roomy_capacity(joined.cache.capacity)
            self.held = held = BlockState.empty(count, capacity, size, sorted(eos_ids), joined.block.device)
        held.put(joined)
        self.state = held.first(len(prompts))
        return result

    @torch.inference_mode()
    def step(self, finished: bool, longest: int) -> Tensor:
        assert self.state is not None
        key = (len(self.state.active), self.reveal, self.params.unseeded, finished)
        if key not in self.graphs:
            if len(self.graphs) >= MOST_GRAPHS:
                self.graphs.clear()
            self.graphs[key] = self._capture(self.state, finished)
        self.graphs[key].graph.replay()
        return self.graphs[key].result

    def keep(self, alive: list[int]) -> list[int]:
        assert self.state is not None
        rows = len(self.state.active)
        self.state.active.copy_(torch.tensor([row in alive for row in range(rows)]))
        return list(range(rows))

    def _capture(self, state: BlockState, finished: bool) -> Captured:
        tensors = [state.cache.lengths, *state.rows()]
        kept = [tensor.clone() for tensor in tensors]
        reveal, params = self.reveal, self.params
        graph, result = self.recorder.record(
            lambda: denoise(self.network, state, reveal, params, finished), f"denoising of {len(state.active)} rows"
        )
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
        return Captured(graph, result)


def denoiser_for(network: Network, reveal: Reveal, params: SamplingParams) -> Denoiser:
    """The network's own captured forwards on a GPU, eager ones elsewhere."""
    prepare_fused(network)
    if network.device.type != "cuda":
        return Denoiser(network, reveal, params)
    if not isinstance(network.runner, GraphDenoiser):
        network.runner = GraphDenoiser(network, GraphRunner(network))
    network.runner.reveal, network.runner.params = reveal, params
    return network.runner


@dataclass
class _Place:
    """A row of the batch: how much of its block is handed out (or prompt) already, and the tokens in its cache."""

    row: Row
    emitted: int
    cached: int


class BlockDiffusion:
    """Decodes batches of prompts; rows finish their blocks and end at different times.

    Raises:
        TidarError: for a model that is no block-diffusion model.
    """

    def __init__(
        self,
        network: Network,
        reveal: Reveal,
        params: SamplingParams | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if network.config is None or network.config.objective != "block-diffusion":
            raise TidarError(
                "mode 'block-diffusion' decodes models of `tidar train --objective block-diffusion`; this is none"
            )
        self.network, self.reveal, self.tokenizer = network, reveal, tokenizer
        self.block_size = network.config.block_size
        self.params = params or SamplingParams()
        if self.params.trust < 1:
            raise TidarError("trust below 1 mixes AR and diffusion logits, but a block-diffusion model has no AR half")

    def run(
        self, prompts: Sequence[list[int]], limits: Limits, batch_size: int | None = None, streaming: bool = True
    ) -> Iterator[list[Update]]:
        """Decode prompts (token ids), `batch_size` at a time (default: all); arguments as in `Engine.run`.

        An update has the tokens before the first mask. A batch is not refilled: it shrinks as its rows end.
        """
        rows = [new_row(self.network, self.tokenizer, i, prompt, limits, streaming) for i, prompt in enumerate(prompts)]
        size = batch_size or max(1, len(prompts))
        for first in range(0, len(rows), size):
            yield from self._batch([(row, prompts[row.answer.row]) for row in rows[first : first + size]], limits)

    def _batch(self, jobs: list[tuple[Row, list[int]]], limits: Limits) -> Iterator[list[Update]]:
        size, started = self.block_size, time.perf_counter()
        places = [_Place(row, len(prompt) % size, len(prompt) // size * size) for row, prompt in jobs]
        for place in places:
            place.row.started = started
        denoiser = denoiser_for(self.network, self.reveal, self.params)
        result = denoiser.start(
            [prompt for _, prompt in jobs],
            [row.answer.row for row, _ in jobs],
            [row.room for row, _ in jobs],
            limits.eos_ids,
        )
        while True:
            values = result.tolist()
            before = [i for i, place in enumerate(places) if place.row.answer.finish_reason is None]
            yield [_collect(places[i], values[i], limits) for i in before]
            alive = [i for i in before if places[i].row.answer.finish_reason is None]
            if not alive:
                return
            if len(alive) < len(before):
                kept = denoiser.keep(alive)
                places, values = [places[i] for i in kept], [values[i] for i in kept]
                alive = [i for i, place in enumerate(places) if place.row.answer.finish_reason is None]
            done = [i for i in alive if values[i][-1]]
            result = denoiser.step(bool(done), max(places[i].cached for i in alive))
            for i in done:
                places[i].cached += size


def _collect(place: _Place, result: list[int], limits: Limits) -> Update:
    """What a forward gave a row."""
    *block, decided, done = result
    ready = next((i for i, token in enumerate(block) if token == MASKED), len(block))
    tokens = block[place.emitted : ready]
    place.emitted = 0 if done else ready
    return extend(place.row, tokens, limits, decided)
