"""Draw docs/layout-*.svg: who sees whom in each kind of forward, every mask taken from `tidar.layout`.

python docs/draw_layouts.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from draw_step import BLOCKS, CACHED, CLEAN, HIDDEN, INK, SOFT, rect, text, token

from tidar.decode.step import choose_leaves
from tidar.layout import (
    Layout,
    block_causal_layout,
    chain_layout,
    prefill_layout,
    step_layout,
    tiled_anchors,
)

K, PREFIX, SEQUENCE = 3, 3, 9
LEAF = "#d0618d"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLUMN, ROW, GAP, LEFT, TOP, MARGIN, NOTE = 36, 25, 10, 70, 132, 30, 190
NARROWEST = 640  # so that small pictures are not blown up


@dataclass(frozen=True)
class Group:
    """Tokens that stand together: a heading, a colour, what their rows say, and their letters."""

    name: str
    colour: str
    note: tuple[str, str]
    letters: str


TILES = [
    Group("block after C", BLOCKS[0], ("sees A to C,", "learns D E F"), "???"),
    Group("block after F", BLOCKS[1], ("sees A to F,", "learns G H I"), "???"),
]


def training_tiled() -> str:
    layout = chain_layout(SEQUENCE, tiled_anchors(SEQUENCE, K), K)
    groups = [Group("the text", CLEAN, ("causal:", "the AR loss"), LETTERS[:SEQUENCE]), *TILES]
    return picture("Training, as in the paper: blocks tile the text", layout, groups)


def training_random() -> str:
    layout = chain_layout(SEQUENCE, torch.tensor([[1, 2, 5]]), K)
    groups = [
        Group("the text", CLEAN, ("causal, frozen:", "gives the targets"), LETTERS[:SEQUENCE]),
        Group("block after B", BLOCKS[0], ("sees A and B,", "learns C D E"), "???"),
        Group("block after C", BLOCKS[1], ("sees A to C,", "learns D E F"), "???"),
        Group("block after F", BLOCKS[2], ("sees A to F,", "learns G H I"), "???"),
    ]
    return picture("Lossless training: blocks hang anywhere, and may overlap", layout, groups)


def prefill() -> str:
    groups = [
        Group("the prompt", CLEAN, ("causal: their keys", "and values are kept"), LETTERS[:4]),
        Group("first block", BLOCKS[0], ("drafts what", "follows D"), "???"),
    ]
    return picture("Prefill: the prompt and one block behind it", prefill_layout(torch.tensor([4]), 4, K), groups)


def step_pruned() -> str:
    layout = step_layout(K, (1, 3)).after(torch.tensor([PREFIX]))
    groups = [
        Group("drafts", CLEAN, ("causal, behind", "the cache"), "DEF"),
        Group("outcome 1", BLOCKS[0], ("if only D stands:", "drafts 4 5 6"), "???"),
        Group("outcome 3", BLOCKS[2], ("if all three stand:", "drafts 6 7 8"), "???"),
    ]
    return picture("A pruned step: outcome 2 is unlikely and left out", layout, groups)


def step_leaves() -> str:
    parents = tuple(draft for draft, _ in choose_leaves(K, 3))
    layout = step_layout(K, (1, 2, 3), leaves=parents).after(torch.tensor([PREFIX]))
    notes = ("instead of E or F:", f"they hang off {', '.join('DEF'[parent] for parent in parents)}")
    groups = [
        Group("drafts", CLEAN, ("causal, behind", "the cache"), "DEF"),
        Group("leaves", LEAF, notes, "xyz"),
        *(Group(f"outcome {j}", BLOCKS[j - 1], ("sees no leaf:", "drafts as before"), "???") for j in (1, 2, 3)),
    ]
    return picture("A step with three candidate leaves", layout, groups)


def block_diffusion() -> str:
    layout = block_causal_layout(SEQUENCE, tiled_anchors(SEQUENCE, K), K)
    groups = [Group("the text", CLEAN, ("each tile of 3 sees", "itself both ways"), LETTERS[:SEQUENCE]), *TILES]
    return picture("Block diffusion, for comparison: the text is not causal", layout, groups)


PICTURES: dict[str, Callable[[], str]] = {
    "layout-training-tiled": training_tiled,
    "layout-training-random": training_random,
    "layout-prefill": prefill,
    "layout-step-pruned": step_pruned,
    "layout-step-leaves": step_leaves,
    "layout-block-diffusion": block_diffusion,
}


def picture(title: str, layout: Layout, groups: Sequence[Group]) -> str:
    """One forward's mask: rows are its tokens, columns all that they could see."""
    prefix = int(layout.prefix)
    mask = layout.dense_mask(prefix + layout.size)[0, 0].tolist()
    cached = [Group("in the cache", CACHED, ("", ""), LETTERS[:prefix])] if prefix else []
    keys = [*cached, *groups]
    xs, right = places([len(group.letters) for group in keys], LEFT, COLUMN)
    ys, bottom = places([len(group.letters) for group in groups], TOP, ROW)
    width, height = max(right + NOTE, NARROWEST), bottom + MARGIN
    positions = [*range(prefix), *layout.position[0].tolist()]
    colours = [group.colour for group in keys for _ in group.letters]
    letters = "".join(group.letters for group in keys)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        'font-family="Helvetica, Arial, sans-serif">',
        f"<title>{title}</title>",
        f'<rect x="1" y="1" width="{width - 2:g}" height="{height - 2:g}" rx="18" fill="#ffffff" stroke="#d5dbe1"/>',
        text(MARGIN, 38, title, 19, INK, "start", "bold"),
        text(LEFT - 12, TOP - 11, "position", 12, SOFT, "end"),
    ]
    for group, start in zip(keys, starts(keys, xs), strict=True):
        parts.append(text(start + len(group.letters) * COLUMN / 2, TOP - 66, group.name, 14, INK, weight="bold"))
    for x, letter, colour, position in zip(xs, letters, colours, positions, strict=True):
        parts += token(x + 3, TOP - 58, COLUMN - 6, letter, colour)
        parts.append(text(x + COLUMN / 2, TOP - 11, str(position), 13, SOFT))
    for y, row, letter, own in zip(ys, mask, letters[prefix:], colours[prefix:], strict=True):
        parts.append(text(LEFT - 18, y + ROW / 2 + 5, letter, 14, own, weight="bold"))
        for x, seen, colour in zip(xs, row, colours, strict=True):
            parts.append(rect(x + 1.5, y + 1.5, COLUMN - 3, ROW - 3, colour if seen else HIDDEN, 4))
    for group, start in zip(groups, starts(groups, ys), strict=True):
        middle = start + len(group.letters) * ROW / 2
        for line, words in enumerate(group.note):
            parts.append(text(right + 12, middle - 3 + 18 * line, words, 14, SOFT if line else INK, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def places(sizes: Sequence[int], start: float, size: float) -> tuple[list[float], float]:
    """Where each token of groups of `sizes` begins, with a gap between groups; and where the last one ends."""
    found, at = list[float](), start
    for count in sizes:
        found += [at + index * size for index in range(count)]
        at += count * size + GAP
    return found, at - GAP


def starts(groups: Sequence[Group], at: Sequence[float]) -> list[float]:
    """Where each group's first token begins."""
    firsts, index = list[float](), 0
    for group in groups:
        firsts.append(at[index])
        index += len(group.letters)
    return firsts


def main() -> None:
    for name, draw in PICTURES.items():
        Path(__file__).with_name(f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
