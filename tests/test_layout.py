"""Layouts against the rules in words, token by token, and against the paper's pictures."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rules
from tidar.layout import (
    Layout,
    chain_layout,
    prefill_layout,
    random_anchors,
    step_layout,
    tiled_anchors,
    tree_layout,
)
from tidar.layout import (
    chains as layout_chains,
)


def rows_of(values: list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.long).view(len(values), -1)


@st.composite
def chains(draw, lowest_anchor=-1):
    """(clean, anchors per row, block size, documents per row): everything that `chain_layout` takes but the prefix."""
    batch, clean, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(0, 4))
    anchor = st.integers(lowest_anchor, clean - 1)
    anchors = [sorted(draw(st.lists(anchor, min_size=blocks, max_size=blocks))) for _ in range(batch)]
    starts = st.lists(st.booleans(), min_size=clean, max_size=clean)
    documents = [torch.tensor(draw(starts)).cumsum(0).tolist() for _ in range(batch)]
    return clean, anchors, draw(st.integers(1, 4)), documents


def assert_behind_prefix(layout: Layout, row: int, visible: Tensor, positions: Tensor, prefix: int) -> None:
    """The row sees its whole prefix, then `visible` [N, N], then nothing, and stands after the prefix."""
    slots = prefix + layout.size + 2
    wanted = torch.zeros(layout.size, slots, dtype=torch.bool)
    wanted[:, :prefix] = True
    wanted[:, prefix : prefix + layout.size] = visible
    assert layout.dense_mask(slots)[row, 0].equal(wanted)
    assert layout.position[row].equal(positions + prefix)


@given(chains(), st.lists(st.integers(0, 5), min_size=3, max_size=3), st.booleans())
def test_chain_follows_the_rules(chain, prefixes, packed):
    clean, anchors, block_size, documents = chain
    prefix = torch.tensor(prefixes[: len(anchors)])
    layout = chain_layout(clean, rows_of(anchors), block_size, rows_of(documents) if packed else None, prefix)
    assert layout.size == clean + layout.blocks * block_size
    for row, (row_anchors, row_documents) in enumerate(zip(anchors, documents, strict=True)):
        picture = clean, row_anchors, block_size, row_documents if packed else None
        assert_behind_prefix(layout, row, rules.visibility(*picture), rules.positions(*picture), prefixes[row])


@st.composite
def trees(draw):
    """(parents of a depth-first tree, anchors, block size)."""
    parents, path = [], [-1]
    for token in range(draw(st.integers(1, 9))):
        parents.append(draw(st.sampled_from(path)))
        path = [*path[: path.index(parents[-1]) + 1], token]
    anchors = draw(st.lists(st.integers(-1, len(parents) - 1), max_size=4).map(sorted))
    return parents, anchors, draw(st.integers(1, 3))


@given(trees(), st.integers(0, 3))
def test_tree_tokens_see_their_ancestors(tree, prefix):
    parents, anchors, block_size = tree

    def line(token: int) -> list[int]:
        """The token and its ancestors."""
        return [token, *line(parents[token])] if token >= 0 else []

    everyone = rules.tokens(len(parents), anchors, block_size)
    visible = torch.tensor(
        [[q.block == k.block if k.block is not None else k.index in line(q.index) for k in everyone] for q in everyone]
    )
    positions = torch.tensor([len(line(token.index)) - 1 + token.offset for token in everyone])
    layout = tree_layout(parents, rows_of([anchors]), block_size, torch.tensor([prefix]))
    assert_behind_prefix(layout, 0, visible, positions, prefix)


@given(st.integers(1, 8), st.integers(1, 4))
def test_chain_is_the_tree_without_branches(clean, block_size):
    anchors = torch.arange(-1, clean)[None]
    tree, chain = tree_layout(range(-1, clean - 1), anchors, block_size), chain_layout(clean, anchors, block_size)
    assert tree.dense_mask().equal(chain.dense_mask())
    assert tree.position.equal(chain.position)


@pytest.mark.parametrize("parents", [[-1, 0, 0, 1], [-1, -1, 0], [0], [1, -1]])
def test_tree_out_of_depth_first_order_is_refused(parents):
    with pytest.raises(ValueError, match="parent"):
        tree_layout(parents, rows_of([[]]), 2)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(0, 3), st.integers(0, 4))
def test_padding_changes_nothing_in_prefill(lengths, padding, block_size):
    width = max(lengths) + padding
    padded = prefill_layout(torch.tensor(lengths), width, block_size)
    for row, length in enumerate(lengths):
        alone = prefill_layout(torch.tensor([length]), length, block_size)
        real = torch.tensor([*range(length), *range(width, padded.size)])
        assert padded.dense_mask()[row, 0][real][:, real].equal(alone.dense_mask()[0, 0])
        assert not padded.dense_mask()[row, 0][real, length:width].any()
        assert padded.position[row, real].equal(alone.position[0])


@given(chains(), st.integers(0, 3))
def test_mask_mod_and_dense_mask_agree(chain, prefix):
    clean, anchors, block_size, documents = chain
    layout = chain_layout(clean, rows_of(anchors), block_size, rows_of(documents)).after(
        torch.full((len(anchors),), prefix)
    )
    visible, dense = layout.mask_mod(), layout.dense_mask(prefix + layout.size)
    for b, _, q, s in torch.ones_like(dense).nonzero():
        assert visible(b, torch.tensor(0), q, s) == dense[b, 0, q, s]


def test_block_mask_marks_every_tile_with_something_to_see():
    documents = torch.arange(300)[None] // 140
    layout = chain_layout(300, rows_of([[20, 130, 150, 299]]), 32, documents)
    dense, block_mask = layout.dense_mask(), layout.block_mask()
    tiles = torch.nn.functional.max_pool2d(dense.float(), 128, ceil_mode=True)
    assert block_mask.to_dense().equal(tiles.int())
    q, k = torch.arange(layout.size)[:, None], torch.arange(layout.size)
    assert block_mask.mask_mod(torch.tensor(0), torch.tensor(0), q, k).equal(dense[0, 0])


@pytest.mark.parametrize("tokens", [slice(10), slice(10, None)])
def test_a_part_of_the_block_mask_is_that_part_of_the_dense_mask(tokens):
    layout = chain_layout(10, torch.tensor([[1, 6], [0, 8]]), 3, torch.tensor([[0] * 4 + [1] * 6, [0] * 10]))
    first, end, _ = tokens.indices(layout.size)
    mask = layout.block_mask(tokens)
    assert mask.shape == (2, 1, end - first, end)
    b, q, s = torch.arange(2)[:, None, None], torch.arange(end - first)[:, None], torch.arange(end)
    assert mask.mask_mod(b, b, q, s).equal(layout.dense_mask()[:, 0, tokens, :end])


def assert_drawn(mask: Tensor, picture: str) -> None:
    """`mask` [N, S] is the picture: 1 sees, . does not, ? either; spaces are for the eye."""
    drawn = picture.replace(" ", "").split()
    for row, line in zip(mask.tolist(), drawn, strict=True):
        assert all(mark == "?" or sees == (mark == "1") for sees, mark in zip(row, line, strict=True)), line


def test_picture_of_training():
    layout = chain_layout(6, tiled_anchors(6, 2), 2)
    assert layout.position.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4, 5]]
    assert_drawn(
        layout.dense_mask()[0, 0],
        """
        1.....  .. ..
        11....  .. ..
        111...  .. ..
        1111..  .. ..
        11111.  .. ..
        111111  .. ..

        11....  11 ..
        11....  11 ..
        1111..  .. 11
        1111..  .. 11
        """,
    )


def test_picture_of_a_decode_step():
    """Prefix A B C, drafts D E F, and a block for each outcome: 1, 2 or 3 drafts accepted."""
    layout = step_layout(3, [1, 2, 3]).after(torch.tensor([3]))
    assert layout.position.tolist() == [[3, 4, 5, 4, 5, 6, 5, 6, 7, 6, 7, 8]]
    assert_drawn(
        layout.dense_mask(15)[0, 0],
        """
        111  1..  ... ... ...
        111  11.  ... ... ...
        111  111  ... ... ...

        111  1..  111 ... ...
        111  1..  111 ... ...
        111  1..  111 ... ...
        111  11.  ... 111 ...
        111  11.  ... 111 ...
        111  11.  ... 111 ...
        111  111  ... ... 111
        111  111  ... ... 111
        111  111  ... ... 111
        """,
    )


def test_picture_of_prefill():
    layout = prefill_layout(torch.tensor([4, 2]), 4, 3)
    assert layout.position[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert layout.position[1, [0, 1, 4, 5, 6]].tolist() == [0, 1, 2, 3, 4]
    assert_drawn(
        layout.dense_mask()[0, 0],
        """
        1...  ...
        11..  ...
        111.  ...
        1111  ...

        1111  111
        1111  111
        1111  111
        """,
    )
    assert_drawn(
        layout.dense_mask()[1, 0],
        """
        1...  ...
        11..  ...
        ????  ???
        ????  ???

        11..  111
        11..  111
        11..  111
        """,
    )


@pytest.mark.parametrize(("draft_length", "outcomes", "slots"), [(4, 4, 20), (8, 8, 72), (16, 16, 272), (16, 6, 112)])
def test_step_has_the_slots_of_the_paper(draft_length, outcomes, slots):
    assert step_layout(draft_length, range(1, outcomes + 1)).size == slots


@given(chains(lowest_anchor=0))
def test_masks_predict_the_tokens_that_follow_their_anchor(chain):
    clean, anchors, block_size, documents = chain
    index, valid = chain_layout(clean, rows_of(anchors), block_size, rows_of(documents)).targets()
    for row, row_documents in enumerate(documents):
        for block, anchor in enumerate(anchors[row]):
            for m in range(block_size):
                target = anchor + 1 + m
                follows = target < clean and row_documents[target] == row_documents[anchor]
                assert valid[row, block, m] == follows
                assert index[row, block, m] == target if follows else 0 <= index[row, block, m] < clean


def test_block_before_the_first_token_predicts_from_it_on():
    index, valid = chain_layout(2, rows_of([[-1]]), 3).targets()
    assert index[valid].tolist() == [0, 1]
    assert valid.tolist() == [[[True, True, False]]]


@given(st.integers(1, 40), st.integers(1, 9))
def test_tiled_blocks_cover_each_position_after_the_first_block_once(clean, block_size):
    layout = chain_layout(clean, tiled_anchors(clean, block_size), block_size)
    index, valid = layout.targets()
    assert index[valid].tolist() == list(range(block_size, clean))


@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3), st.integers(1, 6))
def test_random_anchors_are_distinct_ascending_and_allowed(allowed, blocks):
    anchors = random_anchors(torch.tensor(allowed), blocks, torch.Generator().manual_seed(0)).tolist()
    for row, row_allowed in zip(anchors, allowed, strict=True):
        assert len(row) == blocks
        assert all(a < b for a, b in pairwise(row))
        inside = sum(row_allowed[anchor] for anchor in row)
        assert inside == min(blocks, sum(row_allowed))


def test_random_anchors_reach_every_allowed_position():
    allowed = torch.arange(10).expand(200, 10) % 3 > 0
    drawn = random_anchors(allowed, 2, torch.Generator().manual_seed(0)).unique()
    assert drawn.tolist() == [1, 2, 4, 5, 7, 8]


@given(st.data())
def test_pruned_steps_are_trees_with_leaves(data):
    """The quick way to the layout of a step says what the general one says."""
    length = data.draw(st.integers(1, 6))
    leaves = tuple(sorted(data.draw(st.lists(st.integers(0, length - 1), max_size=5)), reverse=True))
    count = data.draw(st.integers(0, length))
    chosen = [sorted(data.draw(st.permutations(range(1, length + 1)))[:count]) for _ in range(2)]
    prefix = torch.tensor([2, 5])
    pruned = step_layout(length, rows_of(chosen), leaves=leaves).after(prefix)
    for row, outcomes in enumerate(chosen):
        whole = step_layout(length, outcomes, leaves=leaves).after(prefix[row : row + 1])
        for name in ("depth", "enter", "exit", "position"):
            assert getattr(pruned, name)[row].equal(getattr(whole, name)[0]), name
        assert (pruned.clean, pruned.size) == (whole.clean, whole.size) == (length + len(leaves), whole.size)


def test_picture_of_a_step_with_leaves():
    """Prefix A, drafts D E F; two alternatives to E and one to F; a block for outcome 1."""
    layout = step_layout(3, [1], leaves=(1, 0, 0)).after(torch.tensor([1]))
    assert layout.position.tolist() == [[1, 2, 3, 3, 2, 2, 2, 3, 4]]
    assert_drawn(
        layout.dense_mask(10)[0, 0],
        """
        1  1.. ... ...
        1  11. ... ...
        1  111 ... ...

        1  11. 1.. ...
        1  1.. .1. ...
        1  1.. ..1 ...

        1  1.. ... 111
        1  1.. ... 111
        1  1.. ... 111
        """,
    )


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_chains_one_after_another_are_each_a_chain(lengths):
    enter, exit_ = layout_chains(lengths)
    whole = [chain_layout(length, torch.empty(1, 0, dtype=torch.long), 1) for length in lengths]
    assert torch.equal(enter, torch.cat([layout.enter[0] for layout in whole]))
    assert torch.equal(exit_, torch.cat([layout.exit[0] for layout in whole]))
