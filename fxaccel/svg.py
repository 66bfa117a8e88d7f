"""Small drawings as SVG text, for a page that has the colours of their classes (fxaccel/page/page.css).

was, is, third    lines of a chart;  mark: a point of it
seen, data, hidden    cells of a mask
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TypeAlias

CELL = 3.0  # px of a mask's cell, more where there are few
SIDE = 192.0  # px of a mask
CELLS = {"#": "seen", "?": "data", ".": "hidden"}
Place: TypeAlias = Callable[[float, float], tuple[str, str]]
"""Where a point of a chart is, in px."""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 256, 64, 38, 28  # px of a chart, and of what is around it


def mask(rows: Sequence[str]) -> str:
    """A row of cells for each text: # for seen, ? for what data decides, . for hidden."""
    wide, high = max(map(len, rows)), len(rows)
    size = max(CELL, SIDE / max(wide, high))
    paths: dict[str, list[str]] = {}
    for y, row in enumerate(rows):
        x = 0
        for cell, run in groupby(row):
            length = len(list(run))
            paths.setdefault(cell, []).append(f"M{x} {y}h{length}v1h-{length}z")
            x += length
    shapes = (f'<path class="{CELLS[c]}" d="{"".join(d)}"/>' for c, d in sorted(paths.items()))
    box = f'width="{_px(size * wide)}" height="{_px(size * high)}" viewBox="0 0 {wide} {high}"'
    return f'<svg {box} shape-rendering="crispEdges" role="img">{"".join(shapes)}</svg>'


@dataclass(frozen=True)
class Series:
    """Points of a chart: a line, or where it is a "mark" the points by themselves."""

    cls: str
    label: str
    points: Sequence[tuple[float, float]]


def chart(series: Sequence[Series], x: str, y: str, low: tuple[float, float] = (0.0, 0.0)) -> str:
    """Lines over axes that are called x and y; low: where the axes begin."""
    points = [p for s in series for p in s.points]
    (x0, y0), x1, y1 = low, max(p[0] for p in points), max(p[1] for p in points)
    wide, high = WIDTH - LEFT - 12, HEIGHT - TOP - BOTTOM

    def at(px: float, py: float) -> tuple[str, str]:
        across = (px - x0) / (x1 - x0) if x1 > x0 else 0.0
        up = (py - y0) / (y1 - y0) if y1 > y0 else 0.0
        return _px(LEFT + wide * across), _px(TOP + high * (1 - up))

    parts = [*_axes(x0, x1, y0, y1, at)]
    for one in series:
        if one.cls == "mark":
            spots = [at(*p) for p in one.points]
            parts += [f'<circle class="mark" cx="{a}" cy="{b}" r="4"/>' for a, b in spots]
        else:
            parts.append(f'<path class="{one.cls}" d="M{"L".join(" ".join(at(*p)) for p in one.points)}"/>')
    parts.append(_text(LEFT + wide / 2, HEIGHT - 6, x, "middle"))
    parts.append(f'<text transform="translate(12 {_px(TOP + high / 2)}) rotate(-90)" text-anchor="middle">'
                 f"{escape(y)}</text>")  # fmt: skip
    for place, one in enumerate(series):
        left = LEFT + 120 * place
        shape = f'<path class="{one.cls}" d="M{left} 10h18"/>'
        parts.append(f'<circle class="mark" cx="{left + 9}" cy="10" r="4"/>' if one.cls == "mark" else shape)
        parts.append(_text(left + 24, 14, one.label))
    return _svg(WIDTH, HEIGHT, parts)


def _axes(x0: float, x1: float, y0: float, y1: float, at: Place) -> Iterator[str]:
    for value in ticks(y0, y1):
        (left, row), (right, _) = at(x0, value), at(x1, value)
        yield f'<path class="grid" d="M{left} {row}H{right}"/>'
        yield _text(float(left) - 5, float(row) + 4, f"{value:g}", "end")
    for value in ticks(x0, x1):
        column, foot = at(value, y0)
        yield f'<path class="axis" d="M{column} {foot}v4"/>'
        yield _text(float(column), float(foot) + 16, f"{value:g}", "middle")
    (left, foot), (right, _) = at(x0, y0), at(x1, y0)
    yield f'<path class="axis" d="M{left} {foot}H{right}"/>'


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(s * unit for s in (1, 2, 5, 10) if s * unit >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Bar:
    """A stretch of time in a row of bars: its colour, how strong, and the text in it."""

    row: int
    start: float
    end: float
    colour: str
    opacity: float = 1.0
    label: str = ""


def bars(rows: Sequence[str], found: Iterable[Bar], x: str, legend: Sequence[tuple[str, str]]) -> str:
    """Rows with names, time from left to right; legend: (colour, text)."""
    found, wide, tall = list(found), 760, 26
    high, end = 34 + tall * len(rows), max((b.end for b in found), default=0.0) or 1.0
    left, scale = 64, (wide - 76) / end
    parts = [_text(left - 8, tall * i + 21, name, "end") for i, name in enumerate(rows)]
    for bar in found:
        across, long = left + scale * bar.start, scale * (bar.end - bar.start)
        place = f'x="{_px(across)}" y="{tall * bar.row + 6}" width="{_px(max(long - 0.5, 0.5))}"'
        paint = f'height="{tall - 4}" fill="{bar.colour}" fill-opacity="{bar.opacity:.2f}"'
        parts.append(f"<rect {place} {paint}/>")
        if bar.label and long > 7 * len(bar.label) + 2:
            parts.append(_text(across + long / 2, tall * bar.row + 21, bar.label, "middle"))
    for value in ticks(0.0, end):
        parts.append(_text(left + scale * value, high - 8, f"{value:g}", "middle"))
    parts.append(_text(left - 8, high - 8, x, "end"))
    for i, (colour, text) in enumerate(legend):
        parts.append(f'<rect x="{left + 150 * i}" y="{high + 2}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(left + 150 * i + 15, high + 11, text))
    return _svg(wide, high + 18, parts)


def _svg(wide: float, high: float, parts: Iterable[str]) -> str:
    box = f'width="{_px(wide)}" height="{_px(high)}" viewBox="0 0 {_px(wide)} {_px(high)}"'
    return f'<svg {box} role="img">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{_px(x)}" y="{_px(y)}" text-anchor="{anchor}">{escape(text)}</text>'


def _px(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
