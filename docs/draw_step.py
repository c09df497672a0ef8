"""Draw docs/step.svg: one decode step for K = 3, its attention mask taken from `tidar.layout`.

python docs/draw_step.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from tidar.layout import step_layout

K, PREFIX = 3, 3
WIDTH, HEIGHT = 1000, 828
LEFT, TOP, COLUMN, ROW, GAP = 142, 176, 41, 27, 10
INK, SOFT, HIDDEN, CLEAN = "#1f2933", "#52606d", "#eef1f4", "#4f86c6"
CACHED = "#9fb3c8"
BLOCKS = ("#e08e3c", "#4c9f70", "#8d6cc2")
REJECTED = "#c0392b"
WORDS = ("only D stands", "D and E stand", "all three stand")


def picture() -> str:
    layout = step_layout(K, range(1, K + 1)).after(torch.tensor([PREFIX]))
    mask = layout.dense_mask(PREFIX + layout.size)[0, 0].tolist()
    positions = [*range(PREFIX), *layout.position[0].tolist()]
    letters = ["A", "B", "C", "D", "E", "F", *["?"] * (layout.blocks * K)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif">',
        "<title>One TiDAR decode step with three drafts and three outcome blocks</title>",
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{SOFT}"/></marker></defs>',
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="18" fill="#ffffff" stroke="#d5dbe1"/>',
        text(36, 42, "One decode step, K = 3", 22, anchor="start", weight="bold"),
        text(36, 66, "One forward over 12 tokens: 3 drafts to verify, and one block of 3 masks for each outcome.", 15,
             SOFT, "start"),
        *header(letters, positions),
        *grid(mask, letters),
        *story(),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def header(letters: list[str], positions: list[int]) -> list[str]:
    """The row of tokens, which is also the heading of the mask's columns."""
    names = ["in the KV cache", "drafts", *(f"outcome {j}" for j in range(1, K + 1))]
    parts = [
        text(LEFT - 14, TOP - 46, "token", 14, SOFT, "end"),
        text(LEFT - 14, TOP - 13, "position", 14, SOFT, "end"),
    ]
    for group, name in enumerate(names):
        middle = (column(group * K) + column(group * K + K - 1) + COLUMN) / 2
        parts.append(text(middle, TOP - 76, name, 15, INK, weight="bold"))
    for key, (letter, position) in enumerate(zip(letters, positions, strict=True)):
        parts += token(column(key) + 3, TOP - 67, COLUMN - 6, letter, colour(key))
        parts.append(text(column(key) + COLUMN / 2, TOP - 13, str(position), 15, SOFT))
    return parts


def grid(mask: list[list[bool]], letters: list[str]) -> list[str]:
    """Rows are this forward's tokens, columns everything they could attend."""
    parts = []
    for query, visible in enumerate(mask):
        y = line(query)
        parts.append(
            text(LEFT - 20, y + ROW / 2 + 5, letters[PREFIX + query], 15, colour(PREFIX + query), weight="bold")
        )
        for key, seen in enumerate(visible):
            fill = colour(key) if seen else HIDDEN
            parts.append(rect(column(key) + 1.5, y + 1.5, COLUMN - 3, ROW - 3, fill, 4))
    notes = [("causal, as in", "any causal LM")]
    for words, start in zip(WORDS, (4, 5, 6), strict=True):
        notes.append((f"if {words}:", f"drafts {start} {start + 1} {start + 2}"))
    right = column(5 * K - 1) + COLUMN + 14
    for group, (first, second) in enumerate(notes):
        middle = line(group * K + 1) + ROW / 2
        parts.append(text(right, middle - 3, first, 15, INK, "start"))
        parts.append(text(right, middle + 16, second, 15, SOFT, "start"))
    middle = (line(0) + line(4 * K - 1) + ROW) / 2
    turned = text(0, 0, "this forward's tokens (queries)", 14, SOFT)
    parts.append(f'<g transform="translate(96 {middle}) rotate(-90)">{turned}</g>')
    y = line(4 * K - 1) + ROW + 16
    x = LEFT + 2
    for fill, label, step in (
        (CACHED, "sees cached token", 172), (CLEAN, "sees draft", 118), (BLOCKS[0], "", 20), (BLOCKS[1], "", 20),
        (BLOCKS[2], "sees its own block", 176), (HIDDEN, "hidden", 0),
    ):  # fmt: skip
        parts += [rect(x, y, 16, 16, fill, 4), text(x + 23, y + 13, label, 14, SOFT, "start")]
        x += step
    return parts


def story() -> list[str]:
    """What the forward's outputs decide when E is right and F is wrong."""
    y, size, chip = 658, 40, 37
    a, b, c = 36, 346, 640
    parts = [
        f'<path d="M36 592 H{WIDTH - 36}" stroke="#d5dbe1"/>',
        text(
            36, 626, "E stands, F is rejected \u2192 outcome 2's block becomes the next draft", 18, INK, "start", "bold"
        ),
    ]
    for index, letter in enumerate("DEF"):
        x = a + index * (size + 26)
        parts += token(x, y, chip, letter, CLEAN if letter != "F" else HIDDEN, INK if letter == "F" else "#ffffff")
        mark, tint = ("\u2717", REJECTED) if letter == "F" else ("\u2713", BLOCKS[1])
        parts.append(text(x + chip / 2, y + chip + 22, mark, 19, tint, weight="bold"))
        if index:
            parts.append(arrow(f"M{x - 27} {y + chip / 2} H{x - 3}"))
    parts += [
        text(a, y + 88, "The causal logits at D give E: it stands.", 15, INK, "start"),
        text(a, y + 109, "Those at E give G, not F: rejected.", 15, INK, "start"),
        text(a, y + 130, "G is the next token.", 15, INK, "start"),
    ]
    for index, position in enumerate(("5", "6", "7")):
        x = b + index * (size + 6)
        parts += token(x, y, chip, "?", BLOCKS[1] if index else "#b7d9c5")
        parts.append(text(x + chip / 2, y + chip + 20, position, 15, SOFT))
    parts += [
        f'<path d="M{b + 3} {y + chip - 3} L{b + chip - 3} {y + 3}" stroke="{REJECTED}" stroke-width="3"/>',
        text(b, y + 88, "Outcome 2 happened: its block", 15, INK, "start"),
        text(b, y + 109, "gives H I. The mask at 5 is", 15, INK, "start"),
        text(b, y + 130, "dropped: G stands there.", 15, INK, "start"),
        arrow(f"M{a + 3 * size + 54} {y + chip / 2} H{b - 12}"),
        arrow(f"M{b + 3 * (size + 6) + 4} {y + chip / 2} H{c - 12}"),
    ]
    for index, letter in enumerate("ABCDEGHI"):
        x = c + index * 39 + (8 if index > 4 else 0)
        fill = CACHED if index < 5 else CLEAN
        parts += token(x, y, 35, letter, fill)
        parts.append(text(x + 17.5, y + chip + 20, str(index), 15, SOFT))
    parts += [
        text(c, y + 88, "Next step: D E join the cache, F leaves it.", 15, INK, "start"),
        text(c, y + 109, "G H I are the drafts at 5 6 7.", 15, INK, "start"),
        text(c, y + 130, "One forward gained two tokens: E and G.", 15, INK, "start"),
    ]
    return parts


def column(key: int) -> float:
    return LEFT + key * COLUMN + key // K * GAP


def line(query: int) -> float:
    return TOP + query * ROW + query // K * GAP


def colour(key: int) -> str:
    group = key // K
    return CACHED if group == 0 else CLEAN if group == 1 else BLOCKS[group - 2]


def token(x: float, y: float, size: float, letter: str, fill: str, ink: str = "#ffffff") -> list[str]:
    return [rect(x, y, size, size, fill, 8), text(x + size / 2, y + size / 2 + 6, letter, 18, ink, weight="bold")]


def rect(x: float, y: float, width: float, height: float, fill: str, radius: int) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" fill="{fill}"/>'


def text(
    x: float, y: float, words: str, size: int, fill: str = INK, anchor: str = "middle", weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{words}</text>"
    )


def arrow(path: str) -> str:
    return f'<path d="{path}" stroke="{SOFT}" stroke-width="2" fill="none" marker-end="url(#tip)"/>'


if __name__ == "__main__":
    Path(__file__).with_name("step.svg").write_text(picture(), encoding="utf-8")
