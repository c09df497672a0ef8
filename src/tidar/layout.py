"""Where tokens stand and what they may see: clean tokens plus anchored mask blocks.

Training, prefill and decoding are one picture (paper Figs. 3 and 7). *Clean* tokens come first; then B *blocks* of K
mask tokens, each hanging off an **anchor**, the clean token after which the block continues. Think of a forest: every
clean token is a node whose parent is the token before it, and every block is one node (K tokens wide) whose parent is
its anchor. Then the whole visibility rule is

    a token sees the tokens of its own node and of that node's ancestors.

Clean tokens are causal and never see masks (blocks are leaves), a mask sees its context up to the anchor and its own
block in both directions, blocks never see each other (siblings), packed documents are separate trees, and a candidate
tree of drafts is simply a node with several children. Nodes are numbered depth-first, so "is an ancestor of" is an
interval test on two integers per token, which is what a kernel wants as well:

    visible(q, k)  =  enter[k] <= enter[q] < exit[k]

Two training options are other forests under the same rule: a block as a chain of K nodes (causal, as in multi-token
prediction), and tiles of K clean tokens as one node each (the context of block diffusion).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """One forward's tokens: `[clean | block 0 | block 1 | ...]`, N = clean + blocks * block_size, behind a KV prefix.

    All tensors are int64 on one device. B is the batch; rows may differ in everything except the sizes.

    Attributes:
        depth: [B, N] position of each token relative to the end of the row's prefix.
        enter: [B, N] depth-first number of the token's node.
        exit: [B, N] one past the largest number among the node's descendants.
        anchors: [B, blocks] clean index each block continues from, ascending; -1 is the last token of the prefix.
        clean: number of clean tokens.
        block_size: K, mask tokens a block.
        prefix: [B] tokens already in the KV cache, each visible to every token of the row.
        one_chain: the clean tokens are one chain, each seeing all before it: plain causal attention, without a cache.
    """

    depth: Tensor
    enter: Tensor
    exit: Tensor
    anchors: Tensor
    clean: int
    block_size: int
    prefix: Tensor
    one_chain: bool = False

    @property
    def size(self) -> int:
        """N, the tokens (slots) of the forward."""
        return self.depth.shape[1]

    @property
    def blocks(self) -> int:
        return self.anchors.shape[1]

    @property
    def position(self) -> Tensor:
        """[B, N] position ids: the prefix, then depth in the tree (masks stand at anchor + 1 .. anchor + K)."""
        return self.depth + self.prefix[:, None]

    @property
    def masked(self) -> slice:
        """The tokens whose attention, in a forward without a cache, needs a mask: clean tokens in one chain do not."""
        return slice(self.clean if self.one_chain else 0, self.size)

    def block(self, index: int) -> slice:
        """Slice of block `index` along the token axis."""
        start = self.clean + index * self.block_size
        return slice(start, start + self.block_size)

    def after(self, prefix: Tensor) -> Layout:
        """The same tokens behind `prefix` [B] cached tokens a row; a one-row layout is broadcast."""
        batch = prefix.shape[0]
        wide = {name: getattr(self, name).expand(batch, -1) for name in ("depth", "enter", "exit", "anchors")}
        return replace(self, prefix=prefix, **wide)

    def mask_mod(self, first: int = 0) -> MaskMod:
        """FlexAttention predicate (batch, head, query token, key slot) -> visible; query 0 is token `first`.

        Key slot s of a row holds its cached prefix for s < prefix, then the tokens of this forward, then nothing.
        """
        prefix, enter, exit_, size = self.prefix, self.enter, self.exit, self.size

        def visible(b: Tensor, h: Tensor, q: Tensor, s: Tensor) -> Tensor:
            k = s - prefix[b]
            inside = k.clamp(0, size - 1)
            below = descends(enter[b, q + first], enter[b, inside], exit_[b, inside])
            return (k < 0) | ((k < size) & below)

        return visible

    def dense_mask(self, key_slots: int | None = None) -> Tensor:
        """[B, 1, N, key_slots] bool, True where visible; without a cache key_slots is N."""
        device = self.depth.device
        b = torch.arange(self.depth.shape[0], device=device)[:, None, None, None]
        q = torch.arange(self.size, device=device)[:, None]
        s = torch.arange(self.size if key_slots is None else key_slots, device=device)
        return self.mask_mod()(b, torch.zeros_like(b), q, s)

    def block_mask(self, tokens: slice = slice(None)) -> BlockMask:
        """FlexAttention BlockMask of `tokens` in a forward without a cache, over the keys up to the last of them.

        On a GPU it is made by a compiled kernel: eagerly, the predicate is evaluated as tensors of [B, N, N] integers.
        """
        first, end, _ = tokens.indices(self.size)
        rows, device = self.depth.shape[0], self.depth.device
        create = _create_block_mask() if device.type == "cuda" else create_block_mask
        return create(self.mask_mod(first), rows, None, end - first, end, device=device)

    def targets(self) -> tuple[Tensor, Tensor]:
        """What each mask should predict: (clean index [B, blocks, K], valid [B, blocks, K] bool).

        The mask at anchor + m predicts the clean token at anchor + m (labels are not shifted, Sec. 3.2). A target is
        valid where that token exists and continues the anchor's own document; invalid indices are clamped into range.
        """
        offsets = torch.arange(1, self.block_size + 1, device=self.depth.device)
        raw = self.anchors[:, :, None] + offsets
        index = raw.clamp(max=self.clean - 1)
        anchor = self.anchors.clamp(min=0)
        flat = index.flatten(1)
        node = self.enter.gather(1, flat).view_as(index)
        same_tree = descends(node, self.enter.gather(1, anchor)[..., None], self.exit.gather(1, anchor)[..., None])
        return index, (raw == index) & (same_tree | (self.anchors < 0)[..., None])


def descends(node: Tensor, enter: Tensor, exit_: Tensor) -> Tensor:
    """The visibility rule: whether a token of node `node` sees the tokens of a node with these numbers."""
    return (enter <= node) & (node < exit_)


def chains(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`enter` and `exit`, each [sum of lengths], of chains that lie one after another, numbered within each."""
    sizes = torch.tensor(lengths)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return torch.arange(len(starts)) - starts, sizes.repeat_interleave(sizes)


@cache
def _create_block_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask)


def chain_layout(
    clean: int,
    anchors: Tensor,
    block_size: int,
    documents: Tensor | None = None,
    prefix: Tensor | None = None,
    causal_blocks: bool = False,
) -> Layout:
    """Clean tokens in a row, each the child of the one before it, plus one block an anchor.

    Args:
        clean: number of clean tokens.
        anchors: [B, blocks] int64, ascending in each row, -1 .. clean - 1.
        block_size: K.
        documents: [B, clean] ids of packed documents, equal ids adjacent; a new id starts a new tree at position 0.
        prefix: [B] cached tokens; none by default.
        causal_blocks: a mask sees only the earlier ones of its block.
    """
    index = torch.arange(clean, device=anchors.device).expand(len(anchors), clean)
    first, last = _document_bounds(index, documents)
    layout = _hang_blocks(index - first, last, anchors, block_size, prefix, causal_blocks)
    return replace(layout, one_chain=documents is None)


def block_causal_layout(clean: int, anchors: Tensor, block_size: int, documents: Tensor | None = None) -> Layout:
    """Block diffusion (BD3-LM, arXiv 2503.09573): clean tokens see their own tile of K in both directions too.

    A tile (its part in one document) is one node, K tokens wide, and the child of the tile before it. Arguments are as
    in `chain_layout`; anchors are last tokens of tiles, so that a block sees the tiles before it and itself.
    """
    layout = chain_layout(clean, anchors, block_size, documents)
    index = torch.arange(clean, device=anchors.device).expand(len(anchors), clean)
    tile_ends = index // block_size * block_size + block_size - 1
    ends = torch.minimum(tile_ends, _document_bounds(index, documents)[1])
    enter = torch.cat((layout.enter.gather(1, ends), layout.enter[:, clean:]), 1)
    return replace(layout, enter=enter, one_chain=False)


def _document_bounds(index: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """First and last token of the document of each token in `index` [B, clean] (0, 1, ...)."""
    if documents is None:
        return torch.zeros_like(index), torch.full_like(index, index.shape[1] - 1)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = torch.where(starts, index, 0).cummax(1).values
    last = torch.where(starts.roll(-1, 1), index, index.shape[1]).flip(1).cummin(1).values.flip(1)
    return first, last


def tree_layout(
    parents: Sequence[int],
    anchors: Tensor,
    block_size: int,
    prefix: Tensor | None = None,
    causal_blocks: bool = False,
) -> Layout:
    """Clean tokens as a tree: `parents[i]` < i is the parent of token i, -1 for a root; depth-first order.

    `anchors` is [B, blocks] as in `chain_layout`. Raises ValueError if the order is not depth-first.
    """
    depth, last, path = [0] * len(parents), list(range(len(parents))), list[int]()
    for token, parent in enumerate(parents):
        while path and path[-1] != parent:
            path.pop()
        if parent >= 0 and not path:
            raise ValueError(f"token {token} follows a branch that does not lead to its parent {parent}")
        depth[token] = depth[parent] + 1 if parent >= 0 else 0
        path.append(token)
        for ancestor in path:
            last[ancestor] = token
    rows = torch.tensor([depth, last], device=anchors.device)[:, None].expand(2, anchors.shape[0], -1)
    return _hang_blocks(rows[0], rows[1], anchors, block_size, prefix, causal_blocks)


def _hang_blocks(
    depth: Tensor, last: Tensor, anchors: Tensor, block_size: int, prefix: Tensor | None, causal_blocks: bool = False
) -> Layout:
    """Number the forest depth-first, a token's blocks before its clean children.

    A block is one node, or with `causal_blocks` a chain of K nodes, each mask the child of the one before it.
    """
    batch, clean = depth.shape
    blocks = anchors.shape[1]
    index = torch.arange(clean + 1, device=depth.device).expand(batch, clean + 1)
    nodes = block_size if causal_blocks else 1
    # Number of clean token i is i plus the nodes of blocks off earlier tokens; block r comes right after its anchor.
    before = torch.searchsorted(anchors.contiguous(), index.contiguous())
    number = index + before * nodes
    block_number = anchors + 1 + torch.arange(blocks, device=depth.device) * nodes
    offsets = torch.arange(1, block_size + 1, device=depth.device)
    anchor_depth = torch.where(anchors < 0, -1, depth.gather(1, anchors.clamp(min=0)) if blocks and clean else anchors)
    block_depth = (anchor_depth[..., None] + offsets).flatten(1)
    block_start = block_number.repeat_interleave(block_size, 1)
    block_enter = block_start + (offsets - 1).repeat(blocks) if causal_blocks else block_start
    return Layout(
        depth=torch.cat((depth, block_depth), 1),
        enter=torch.cat((number[:, :clean], block_enter), 1),
        exit=torch.cat((number.gather(1, last + 1), block_start + nodes), 1),
        anchors=anchors,
        clean=clean,
        block_size=block_size,
        prefix=anchors.new_zeros(batch) if prefix is None else prefix,
    )


def prefill_layout(lengths: Tensor, width: int, block_size: int, causal_blocks: bool = False) -> Layout:
    """Prompts of `lengths` [B] tokens, right-padded to `width`, one block after each row's last token (Fig. 7).

    Padding is a document of its own, so nothing sees it. block_size 0 leaves the block away (plain causal prefill).
    """
    padding = torch.arange(width, device=lengths.device) >= lengths[:, None]
    anchors = lengths[:, None] - 1 if block_size else lengths.new_empty(len(lengths), 0)
    return chain_layout(width, anchors, block_size, documents=padding.long(), causal_blocks=causal_blocks)


def step_layout(
    draft_length: int,
    outcomes: Sequence[int] | Tensor,
    device: torch.device | str = "cpu",
    leaves: tuple[int, ...] = (),
    causal_blocks: bool = False,
) -> Layout:
    """One decode step (Fig. 3 right): the drafts, then leaves, then one block per outcome j, "j drafts accepted".

    The clean tokens are a tree: K drafts in a row, and leaves that hang off them as alternatives to the next draft.
    No prefix; call `.after(prefix)` each step.

    Args:
        draft_length: K.
        outcomes: in 1..K; the same for all rows, or [B, n] int64, ascending in each row.
        device: where the layout lives, for a sequence.
        leaves: the draft (0..K-1) that each leaf continues, in descending order, which makes the tree depth-first.
        causal_blocks: as the model was trained, see `chain_layout`.
    """
    if isinstance(outcomes, Tensor):
        return _pruned_step(draft_length, outcomes - 1, leaves, causal_blocks)
    return _whole_step(draft_length, tuple(sorted(outcomes)), torch.device(device), leaves, causal_blocks)


@cache
def _whole_step(
    length: int, outcomes: tuple[int, ...], device: torch.device, leaves: tuple[int, ...], causal_blocks: bool
) -> Layout:
    """Kept for good: every step of a plan has the same one, and captured steps read it where it lies."""
    with torch.inference_mode(False):
        anchors = torch.tensor([[j - 1 for j in outcomes]], dtype=torch.long, device=device)
        return tree_layout([*range(-1, length - 1), *leaves], anchors, length, causal_blocks=causal_blocks)


def _pruned_step(length: int, anchors: Tensor, leaves: tuple[int, ...], causal_blocks: bool) -> Layout:
    """`tree_layout` of a step whose anchors [B, n] are new each time; in few operations, as each is a launch."""
    batch, blocks = anchors.shape
    bare = _whole_step(length, (), anchors.device, leaves, causal_blocks)
    index, offsets = bare.depth[:, :length], bare.depth[:, :length] + 1
    nodes = length if causal_blocks else 1
    number = index + (anchors[:, None, :] < index[..., None]).sum(-1) * nodes
    start = (anchors + 1 + index[:, :blocks] * nodes)[..., None].expand(-1, -1, length)
    own = (start + index[:, None] if causal_blocks else start).flatten(1)
    behind = bare.enter[:, length:] + blocks * nodes  # leaves are numbered after all drafts and blocks
    return Layout(
        depth=torch.cat((bare.depth.expand(batch, -1), (anchors[..., None] + offsets[:, None]).flatten(1)), 1),
        enter=torch.cat((number, behind.expand(batch, -1), own), 1),
        exit=torch.cat(((bare.exit + blocks * nodes).expand(batch, -1), start.flatten(1) + nodes), 1),
        anchors=anchors,
        clean=length + len(leaves),
        block_size=length,
        prefix=bare.prefix.expand(batch),
    )


def denoise_prefill_layout(lengths: Tensor, width: int, block_size: int) -> Layout:
    """Block diffusion's prefill: whole tiles of prompts, then the block that goes on from each row's last one.

    `lengths` [B] are multiples of K, 0 for a prompt that fills no tile; prompts are right-padded to `width`. What is
    left of a prompt is shown in the block, as it was in training.
    """
    padding = torch.arange(width, device=lengths.device) >= lengths[:, None]
    return block_causal_layout(width, lengths[:, None] - 1, block_size, documents=padding.long())


def denoise_layout(block_size: int, finished: Tensor | None, rows: int, device: torch.device | str = "cpu") -> Layout:
    """One forward of block diffusion: the block that is being decoded, behind the tiles in the cache.

    Rows whose last block is `finished` [B] bool carry its K tokens first, as a clean tile, and the block hangs off it:
    the tile's keys and values are those of training, which never come from a forward in which it held masks. In other
    rows the K clean tokens are seen by nobody. Without `finished` no row has any. No prefix; call `.after(prefix)`.
    """
    if finished is None:
        return block_causal_layout(0, torch.full((rows, 1), -1, device=device), block_size)
    return block_causal_layout(block_size, torch.where(finished, block_size - 1, -1)[:, None], block_size)


def tiled_anchors(clean: int, block_size: int, device: torch.device | str = "cpu") -> Tensor:
    """[1, blocks] anchors K-1, 2K-1, ... whose blocks tile the rest of the sequence (Fig. 3 left)."""
    return torch.arange(block_size - 1, max(clean, block_size) - 1, block_size, device=device)[None]


def random_anchors(allowed: Tensor, blocks: int, generator: torch.Generator | None = None) -> Tensor:
    """[B, blocks] distinct random anchors a row, ascending, from the positions where `allowed` [B, S] is True.

    A row with fewer allowed positions is filled up with others. Blocks may overlap: they never see each other.
    """
    score = torch.rand(allowed.shape, generator=generator, device=allowed.device) + allowed
    return score.topk(blocks, dim=1).indices.sort(1).values
