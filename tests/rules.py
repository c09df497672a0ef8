"""Who attends whom (tidar.md, section 1) in words, one pair of tokens at a time: what everything is held against."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Token(NamedTuple):
    """A clean token (block None, offset 0) at `index`, or a mask `offset` = 1..K places after its anchor `index`."""

    block: int | None
    index: int
    offset: int


def tokens(clean: int, anchors: Sequence[int], block_size: int) -> list[Token]:
    masks = [Token(b, anchor, m) for b, anchor in enumerate(anchors) for m in range(1, block_size + 1)]
    return [Token(None, i, 0) for i in range(clean)] + masks


def may_attend(query: Token, key: Token, documents: Sequence[int]) -> bool:
    if key.block is not None:  # masks are seen by their own block alone, in both directions
        return query.block == key.block
    # Clean tokens are seen by what comes later in their document; a block comes right after its anchor.
    return key.index <= query.index and documents[key.index] == documents[query.index]


def visibility(clean: int, anchors: Sequence[int], block_size: int, documents: Sequence[int] | None = None) -> Tensor:
    """[N, N] bool: may query (row) attend key (column)?"""
    documents = documents or [0] * clean
    everyone = tokens(clean, anchors, block_size)
    return torch.tensor([[may_attend(q, k, documents) for k in everyone] for q in everyone])


def positions(clean: int, anchors: Sequence[int], block_size: int, documents: Sequence[int] | None = None) -> Tensor:
    """[N] positions, counted from the start of each document (an anchor of -1 stands right before the first token)."""
    documents = documents or [0] * clean
    start = {-1: 0} | {i: documents.index(document) for i, document in enumerate(documents)}
    return torch.tensor([t.index + t.offset - start[t.index] for t in tokens(clean, anchors, block_size)])
