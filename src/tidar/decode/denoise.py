"""One forward of block diffusion: some masks of a row's block become tokens, and finished blocks join the cache.

What `prefill` and `step` are to TiDAR (see step.py). The cache is exact: a block's keys and values are those of its
finished tokens, as training saw them. They are computed in the next block's first forward, and cost none of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tidar.decode.cache import RowCache
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
