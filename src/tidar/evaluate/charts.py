"""Charts as inline SVG whose colours come from the page, so that they follow its light or dark theme.

Text and marks are styled by class (see report.py); points carry numbers, which a legend explains, as names would
overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from tidar.evaluate.statistics import Interval

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 46
TICKS = 5


class Point(NamedTuple):
    """A numbered mark; `group` 0..5 picks its colour."""

    number: int
    name: str
    x: Interval
    y: Interval
    group: int = 0


class Axis(NamedTuple):
    """A linear scale from data to pixels."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round numbers within the axis."""
        rough = (self.high - self.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def scatter(points: Sequence[Point], x_label: str, y_label: str, percent: bool) -> str:
    """Points with their intervals as crosses; `percent` formats the y axis."""
    x = _axis([p.x for p in points], LEFT, WIDTH - RIGHT, below=0.04)
    y = _axis([p.y for p in points], HEIGHT - BOTTOM, TOP, below=0.06)
    marks = []
    for p in points:
        cx, cy = x(p.x.value), y(p.y.value)
        title = f"<title>{p.number} {escape(p.name)}: {_number(p.x.value)}, {_value(p.y.value, percent)}</title>"
        marks.append(
            f'<g class="g{p.group}">{title}'
            f'<path class="bar" d="M{x(p.x.low):.1f} {cy:.1f}H{x(p.x.high):.1f}'
            f'M{cx:.1f} {y(p.y.low):.1f}V{y(p.y.high):.1f}"/>'
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="9"/>'
            f'<text class="n" x="{cx:.1f}" y="{cy + 3.8:.1f}">{p.number}</text></g>'
        )
    return _svg(HEIGHT, _frame(x, y, x_label, y_label, percent) + "".join(marks), f"{y_label} against {x_label}")


def lines(xs: Sequence[float], ys: Sequence[Interval], x_label: str, y_label: str, percent: bool, group: int) -> str:
    """One line with a band for its intervals."""
    height = 220
    x = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT - 8)
    y = _axis(list(ys), height - BOTTOM, TOP)
    upper = [f"{x(a):.1f} {y(b.high):.1f}" for a, b in zip(xs, ys, strict=True)]
    lower = [f"{x(a):.1f} {y(b.low):.1f}" for a, b in zip(xs, ys, strict=True)][::-1]
    middle = [f"{x(a):.1f} {y(b.value):.1f}" for a, b in zip(xs, ys, strict=True)]
    dots = "".join(
        f'<circle cx="{x(a):.1f}" cy="{y(b.value):.1f}" r="4"><title>{a:g}: {_value(b.value, percent)}</title></circle>'
        for a, b in zip(xs, ys, strict=True)
    )
    body = f'<path class="band" d="M{" L".join(upper + lower)}Z"/><path class="line" d="M{" L".join(middle)}"/>{dots}'
    frame = _frame(x, y, x_label, y_label, percent)
    return _svg(height, frame + f'<g class="g{group}">{body}</g>', f"{y_label} against {x_label}")


def histogram(counts: Sequence[int], group: int, label: str) -> str:
    """Share of forwards that gained 0, 1, 2, ... tokens."""
    width, height, left, bottom = 260, 130, 30, 22
    total, most = sum(counts), max(counts)
    slot = (width - left - 4) / len(counts)
    top = 16
    bars = []
    for n, count in enumerate(counts):
        tall = (height - bottom - top) * count / most
        at = left + n * slot
        share = count / total
        bars.append(
            f'<rect x="{at + slot * 0.1:.1f}" y="{height - bottom - tall:.1f}" '
            f'width="{slot * 0.8:.1f}" height="{tall:.1f}">'
            f"<title>{n} tokens: {count:,} forwards ({share:.1%})</title></rect>"
        )
        every = 1 + (len(counts) - 1) // 10
        if n % every == 0:
            bars.append(f'<text class="t m" x="{at + slot / 2:.1f}" y="{height - 8}">{n}</text>')
        if count == most:
            bars.append(
                f'<text class="t m" x="{at + slot / 2:.1f}" y="{height - bottom - tall - 4:.1f}">{share:.0%}</text>'
            )
    base = f'<path class="axis" d="M{left} {height - bottom}H{width - 4}"/>'
    return _svg(height, f'{base}<g class="g{group}">{"".join(bars)}</g>', label, width)


def _axis(intervals: Sequence[Interval], begin: float, end: float, below: float = 0.0) -> Axis:
    """From zero, or a share `below` of the range under it, to a little above the highest interval."""
    low, high = min(0.0, *(i.low for i in intervals)), max(i.high for i in intervals)
    span = high - low if high > low else 1.0
    return Axis(low - below * span, low + 1.06 * span, begin, end)


def _frame(x: Axis, y: Axis, x_label: str, y_label: str, percent: bool) -> str:
    """Grid, ticks and labels."""
    parts = []
    for value in y.ticks():
        parts.append(f'<path class="grid" d="M{x.begin:.1f} {y(value):.1f}H{x.end:.1f}"/>')
        parts.append(f'<text class="t e" x="{x.begin - 6:.1f}" y="{y(value) + 4:.1f}">{_value(value, percent)}</text>')
    for value in x.ticks():
        parts.append(f'<path class="grid" d="M{x(value):.1f} {y.begin:.1f}V{y.end:.1f}"/>')
        parts.append(f'<text class="t m" x="{x(value):.1f}" y="{y.begin + 16:.1f}">{_number(value)}</text>')
    middle = (y.begin + y.end) / 2
    parts.append(f'<path class="axis" d="M{x.begin:.1f} {y.end:.1f}V{y.begin:.1f}H{x.end:.1f}"/>')
    parts.append(f'<text class="l m" x="{(x.begin + x.end) / 2:.1f}" y="{y.begin + 36:.1f}">{escape(x_label)}</text>')
    parts.append(
        f'<text class="l m" transform="translate(13 {middle:.1f}) rotate(-90)" x="0" y="0">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def _value(value: float, percent: bool) -> str:
    return f"{100 * value:.3g}%" if percent else _number(value)


def _svg(height: float, body: str, label: str, width: float = WIDTH) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
