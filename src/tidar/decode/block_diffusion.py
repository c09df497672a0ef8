"""Decoding block-diffusion checkpoints: masks of one block become tokens over several forwards, then the next block.

The baseline of the paper's Table 4 (BD3-LM, arXiv 2503.09573; decoders as in LLaDA, arXiv 2502.09992, and Fast-dLLM,
arXiv 2505.22618). Text is tiled by K from the prompt's start, as training tiles a row; the tile in which a prompt ends
is a block that shows what there is of it. The KV cache is exact: a block's keys and values are those of its finished
tokens. They are computed in the next block's first forward, which costs no forward of their own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerBase

from tidar.decode.cache import RowCache
from tidar.decode.engine import Limits, Row, Update, extend, new_row
from tidar.decode.runner import MOST_GRAPHS, Captured, GraphRunner, power_of_two, prepare_fused, roomy_capacity
from tidar.errors import TidarError
from tidar.layout import Layout, denoise_layout, denoise_prefill_layout
from tidar.model.network import MASKED, Network
from tidar.sampling import Reveal, SamplingParams, choose_reveals, draw, row_seeds, undecided, uniforms


@dataclass
class BlockState:
    """A running batch of B rows. All tensors stay where they are.

    Attributes:
        cache: finished tiles.
        block: [B, K] the block that is being decoded, `MASKED` where undecided.
        tile: [B, K] the block before it.
        finished: [B] bool, whether that one is still to be put into the cache.
        start, limit: [B] place of the answer's first token, and one past that of the last that it may have.
        seeds: [B] random streams.
        forwards: [B] so far.
        active: [B] bool; rows that are not do not move.
        eos_ids: [E] tokens that end an answer.
    """

    cache: RowCache
    block: Tensor
    tile: Tensor
    finished: Tensor
    start: Tensor
    limit: Tensor
    seeds: Tensor
    forwards: Tensor
    active: Tensor
    eos_ids: Tensor

    @staticmethod
    def empty(rows: int, capacity: int, block_size: int, eos_ids: Sequence[int], device: torch.device) -> BlockState:
        """No row active; `capacity` tokens of cache a row."""
        start, limit, seeds, forwards = torch.zeros(4, rows, dtype=torch.long, device=device).unbind()
        finished, active = torch.zeros(2, rows, dtype=torch.bool, device=device).unbind()
        block = torch.full((rows, block_size), MASKED, device=device)
        ends = torch.tensor(eos_ids, dtype=torch.long, device=device)
        cache = RowCache(rows, capacity, device)
        return BlockState(cache, block, torch.zeros_like(block), finished, start, limit, seeds, forwards, active, ends)

    def rows(self) -> list[Tensor]:
        """What has an entry for each row, the cache left out."""
        numbers = self.start, self.limit, self.seeds, self.forwards
        return [self.block, self.tile, self.finished, *numbers, self.active]

    def first(self, rows: int) -> BlockState:
        """The first `rows` rows, in the same memory."""
        block, tile, finished, start, limit, seeds, forwards, active = (tensor[:rows] for tensor in self.rows())
        cache = self.cache.first(rows)
        return BlockState(cache, block, tile, finished, start, limit, seeds, forwards, active, self.eos_ids)

    @torch.inference_mode()
    def move_rows(self, rows: Tensor) -> None:
        """Bring the rows `rows` [n] to the front, in that order."""
        self.cache.move_rows(rows)
        for tensor in self.rows():
            tensor[: len(rows)] = tensor[rows]

    @torch.inference_mode()
    def put(self, other: BlockState) -> None:
        """Put the rows of `other`, which may have less room, in the first places; the rest is not active."""
        count = len(other.active)
        self.cache.put_rows(torch.arange(count, device=other.active.device), other.cache)
        self.active.zero_()
        for mine, new in zip(self.rows(), other.rows(), strict=True):
            mine[:count] = new


@torch.inference_mode()
def denoise_prefill(
    network: Network,
    prompts: Sequence[list[int]],
    rows: Sequence[int],
    room: Sequence[int],
    eos_ids: frozenset[int],
    reveal: Reveal,
    params: SamplingParams,
) -> tuple[BlockState, Tensor]:
    """Start job rows `rows` with their prompts, `room` new tokens each at most: a state, and the first result.

    The prompts' whole tiles and the first forward over each row's first block are one forward.
    """
    assert network.config is not None
    size, device = network.config.block_size, network.device
    whole = [len(p) // size * size for p in prompts]
    width = max(1, *whole)
    ids = torch.tensor([p[:n] + [0] * (width - n) for p, n in zip(prompts, whole, strict=True)], device=device)
    block = [p[n:] + [MASKED] * (size - len(p) + n) for p, n in zip(prompts, whole, strict=True)]
    lengths = torch.tensor(whole, device=device)
    longest = max(len(p) + most for p, most in zip(prompts, room, strict=True))
    # Two blocks behind the last whole one; a row that has ended may stand a block further while others go on.
    capacity = max(longest + 3 * size, width + size)
    state = BlockState.empty(len(prompts), capacity, size, sorted(eos_ids), device)
    state.block.copy_(torch.tensor(block))
    state.start.copy_(torch.tensor([len(p) for p in prompts]))
    state.limit.copy_(state.start + torch.tensor(room, device=device))
    state.seeds.copy_(row_seeds(params.seed, torch.tensor(rows)))
    state.active.fill_(True)
    layout = denoise_prefill_layout(lengths, width, size)
    state.cache.reserve(layout.size)
    # cuDNN's attention takes a tenth of a second to plan for a shape it has not seen.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        hidden = network(ids, layout, state.cache, fused=True, block_ids=state.block)
    state.cache.lengths.copy_(lengths)
    return state, _decide(network, state, hidden[:, width:], reveal, params)


@torch.inference_mode()
def denoise(
    network: Network,
    state: BlockState,
    reveal: Reveal,
    params: SamplingParams,
    finished: bool = True,
    longest: int | None = None,
) -> Tensor:
    """One forward over every row's block; [B, K + 2]: the block after it, tokens decided, and 1 where it is finished.

    Like a TiDAR step it changes the state in place and asks the device nothing, so that it can be captured.

    Args:
        finished: whether any row has a finished tile to put into the cache (see `BlockState.finished`).
        longest: the largest of the cache's lengths, where the caller knows it.
    """
    size = state.block.shape[1]
    layout: Layout = denoise_layout(size, state.finished if finished else None, len(state.block), state.block.device)
    layout = layout.after(state.cache.lengths)
    state.cache.reserve(layout.size, longest)
    tile = state.tile if finished else state.tile[:, :0]
    hidden = network(tile, layout, state.cache, fused=True, block_ids=state.block)
    if finished:
        state.cache.lengths.add_(state.finished * size)
    return _decide(network, state, hidden[:, -size:], reveal, params)


def _decide(network: Network, state: BlockState, hidden: Tensor, reveal: Reveal, params: SamplingParams) -> Tensor:
    """Turn masks of the blocks into tokens by final hidden states [B, K, H]; rows whose block is finished move on."""
    assert network.config is not None
    size = state.block.shape[1]
    places = state.cache.lengths[:, None] + torch.arange(size, device=hidden.device)

    def masks() -> Tensor:
        return undecided(state.block, places, state.start, state.limit, state.eos_ids)

    logits = network.head(hidden).float()
    mask = network.config.mask_token_id
    assert mask is not None
    logits[..., mask].fill_(-torch.inf)  # a row of the vocabulary, but no token of any text
    probabilities = logits.softmax(-1)
    if params.greedy:
        confidence, tokens = probabilities.max(-1)
    else:
        # Tokens are drawn at the temperature, but trusted by what the model itself gives them, as LLaDA does.
        tokens = draw(params.probabilities(logits), uniforms(state.seeds, state.forwards, size))
        confidence = probabilities.gather(-1, tokens[..., None])[..., 0]
    chosen = choose_reveals(confidence, masks(), reveal)
    state.block.copy_(torch.where(chosen, tokens, state.block))
    done = ~masks().any(1) & state.active
    result = torch.cat((state.block, chosen.sum(1, keepdim=True), done[:, None]), 1)
    # A row that ends here may leave masks in its tile; it is not run again.
    state.tile.copy_(torch.where(done[:, None], state.block.clamp(min=0), state.tile))
    state.block.masked_fill_(done[:, None], MASKED)
    state.finished.copy_(done)
    state.forwards.add_(1)
    return result


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
        key = (len(self.state.active), self.reveal, replace(self.params, seed=0), finished)
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
        assert self.network.config is not None
        size, started = self.network.config.block_size, time.perf_counter()
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
