"""Decoding block-diffusion checkpoints: masks of one block become tokens over several forwards, then the next block.

The baseline of the paper's Table 4 (BD3-LM, arXiv 2503.09573; decoders as in LLaDA, arXiv 2502.09992, and Fast-dLLM,
arXiv 2505.22618). Text is tiled by K from the prompt's start, as training tiles a row; the tile in which a prompt ends
is a block that shows what there is of it. The KV cache is exact: a block's keys and values are those of its finished
tokens. They are computed in the next block's first forward, which costs no forward of their own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerBase

from tidar.decode.cache import RowCache
from tidar.decode.engine import Limits, Row, Update, extend, new_row
from tidar.decode.runner import prepare_fused
from tidar.errors import TidarError
from tidar.layout import Layout, denoise_layout, denoise_prefill_layout
from tidar.model.network import MASKED, Network
from tidar.sampling import Reveal, SamplingParams, choose_reveals, draw, row_seeds, undecided, uniforms


@dataclass
class BlockState:
    """A running batch of B rows.

    Attributes:
        cache: finished tiles.
        block: [B, K] the block that is being decoded, `MASKED` where undecided.
        tile: [B, K] the block before it.
        finished: [B] bool, whether that one is still to be put into the cache.
        start, limit: [B] place of the answer's first token, and one past that of the last that it may have.
        eos_ids: [E] tokens that end an answer.
        seeds: [B] random streams.
        forwards: [B] so far.
    """

    cache: RowCache
    block: Tensor
    tile: Tensor
    finished: Tensor
    start: Tensor
    limit: Tensor
    eos_ids: Tensor
    seeds: Tensor
    forwards: Tensor

    @torch.inference_mode()
    def keep_rows(self, rows: Tensor) -> None:
        """Go on with the rows `rows` [n] alone, in that order."""
        self.cache.move_rows(rows)
        self.cache = self.cache.first(len(rows))
        for name in ("block", "tile", "finished", "start", "limit", "seeds", "forwards"):
            setattr(self, name, getattr(self, name)[rows])


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
    start = torch.tensor([len(p) for p in prompts], device=device)
    longest = max(len(p) + most for p, most in zip(prompts, room, strict=True))
    batch = len(prompts)
    state = BlockState(
        cache=RowCache(batch, max(longest + 2 * size, width + size), device),
        block=torch.tensor(block, device=device),
        tile=torch.zeros(batch, size, dtype=torch.long, device=device),
        finished=torch.zeros(batch, dtype=torch.bool, device=device),
        start=start,
        limit=start + torch.tensor(room, device=device),
        eos_ids=torch.tensor(sorted(eos_ids), dtype=torch.long, device=device),
        seeds=row_seeds(params.seed, torch.tensor(rows)).to(device),
        forwards=torch.zeros(batch, dtype=torch.long, device=device),
    )
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
    logits[..., network.config.mask_token_id] = -torch.inf  # a row of the vocabulary, but no token of any text
    probabilities = logits.softmax(-1)
    if params.greedy:
        confidence, tokens = probabilities.max(-1)
    else:
        # Tokens are drawn at the temperature, but trusted by what the model itself gives them, as LLaDA does.
        tokens = draw(params.probabilities(logits), uniforms(state.seeds, state.forwards, size))
        confidence = probabilities.gather(-1, tokens[..., None])[..., 0]
    chosen = choose_reveals(confidence, masks(), reveal)
    state.block = torch.where(chosen, tokens, state.block)
    done = ~masks().any(1)
    result = torch.cat((state.block, chosen.sum(1, keepdim=True), done[:, None]), 1)
    # A row that ends here may leave masks in its tile; it is not run again.
    state.tile = torch.where(done[:, None], state.block.clamp(min=0), state.tile)
    state.block = torch.where(done[:, None], MASKED, state.block)
    state.finished = done
    state.forwards = state.forwards + 1
    return result


@dataclass
class _Place:
    """A running row: how much of its block is part of the answer or prompt already, and the tokens in its cache."""

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
        prepare_fused(self.network)
        size = batch_size or max(1, len(prompts))
        for first in range(0, len(rows), size):
            yield from self._batch([(row, prompts[row.answer.row]) for row in rows[first : first + size]], limits)

    def _batch(self, jobs: list[tuple[Row, list[int]]], limits: Limits) -> Iterator[list[Update]]:
        assert self.network.config is not None
        size, started = self.network.config.block_size, time.perf_counter()
        places = [_Place(row, len(prompt) % size, len(prompt) // size * size) for row, prompt in jobs]
        for place in places:
            place.row.started = started
        state, result = denoise_prefill(
            self.network,
            [prompt for _, prompt in jobs],
            [row.answer.row for row, _ in jobs],
            [row.room for row, _ in jobs],
            limits.eos_ids,
            self.reveal,
            self.params,
        )
        while True:
            done = result[:, -1].tolist()
            yield [_collect(place, values, limits) for place, values in zip(places, result.tolist(), strict=True)]
            longest = max(place.cached for place in places)  # as it was before the tiles that are now finished
            alive = [i for i, place in enumerate(places) if place.row.answer.finish_reason is None]
            if not alive:
                return
            if len(alive) < len(places):
                state.keep_rows(torch.tensor(alive, device=result.device))
                places, done = [places[i] for i in alive], [done[i] for i in alive]
            result = denoise(self.network, state, self.reveal, self.params, any(done), longest)
            for place, finished in zip(places, done, strict=True):
                place.cached += size * finished


def _collect(place: _Place, result: list[int], limits: Limits) -> Update:
    """What a forward gave a row."""
    *block, decided, done = result
    ready = next((i for i, token in enumerate(block) if token == MASKED), len(block))
    tokens = block[place.emitted : ready]
    place.emitted = 0 if done else ready
    return extend(place.row, tokens, limits, decided)
