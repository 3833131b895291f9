"""Small charts as inline SVG: axes with round ticks, lines, points, bars. Nothing but the standard library.

A page of 200 runs draws hundreds of curves; a plotting library takes a minute for what these few functions do in one
second. Every mark carries a `<title>`, which a browser shows when the mouse rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = ("#1f77b4", "#d9822b", "#2f8f4e", "#b5333a", "#7b5ea7", "#8a5a44", "#c45a9c", "#5f6b73", "#a29a20", "#1a9ba8")
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 46


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers inside [low, high], about `count` of them."""
    if not high - low > 1e-300:  # of smaller numbers the powers of ten end
        return [low]
    raw = (high - low) / max(1, count)
    base = 10 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 2.5, 5, 10) if base * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten inside [low, high]."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**d for d in decades for m in (1, 2, 5) if low * 0.999 <= m * 10.0**d <= high * 1.001]
    return found if len(found) > 1 else [low, high]


def label(value: float, unit: float = 0.0) -> str:
    """A short form of a tick's number: 1.5M, 20k, 0.001. `unit`: the distance between ticks, for its decimals."""
    for size, mark in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if mark == "k" else size)
            return f"{scaled:.6g}{mark}"
    if unit and unit < 1:
        return f"{value:.{min(8, max(0, -math.floor(math.log10(unit) - 1e-9) + (f'{unit:.2e}'[0:4] == '2.50')))}f}"
    return f"{value:.6g}"


@dataclass
class Chart:
    """One plot. Ranges in data units; marks are drawn in the order they are added."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_title: str
    y_title: str
    width: int = 760
    height: int = 320
    log_x: bool = False
    y_names: Sequence[str] = ()  # instead of numbers: names at 0, 1, 2, ... from the top
    left: int = LEFT
    _marks: list[str] = field(default_factory=list)

    def px(self, value: float) -> float:
        (low, high), room = self.x, self.width - self.left - RIGHT
        if self.log_x:
            value, low, high = math.log(max(value, 1e-300)), math.log(low), math.log(high)
        return round(self.left + room * (value - low) / ((high - low) or 1), 1)

    def py(self, value: float) -> float:
        (low, high), room = self.y, self.height - TOP - BOTTOM
        return round(self.height - BOTTOM - room * (value - low) / ((high - low) or 1), 1)

    def line(self, points: Iterable[tuple[float, float]], colour: str, title: str = "", *, dashed: bool = False
             ) -> None:  # fmt: skip
        """A curve; values beyond the frame are cut at its edge."""
        low, high = self.y
        path = " ".join(f"{self.px(x):g},{self.py(min(max(y, low), high)):g}" for x, y in points)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        marks = f'points="{path}" stroke="{colour}"{dash}'
        self._marks.append(f'<polyline class="curve" {marks}>{_title(title)}</polyline>')

    def point(self, x: float, y: float, colour: str, title: str = "", *, hollow: bool = False) -> None:
        """A place; one beyond the frame is drawn hollow at its edge."""
        inside = min(max(x, self.x[0]), self.x[1]), min(max(y, self.y[0]), self.y[1])
        hollow, (x, y) = hollow or inside != (x, y), inside
        fill = f'fill="none" stroke="{colour}"' if hollow else f'fill="{colour}"'
        self._marks.append(f'<circle cx="{self.px(x):g}" cy="{self.py(y):g}" r="4" {fill}>{_title(title)}</circle>')

    def rect(self, x: tuple[float, float], y: tuple[float, float], colour: str, title: str = "") -> None:
        (left, right), (bottom, top) = (self.px(x[0]), self.px(x[1])), (self.py(y[0]), self.py(y[1]))
        self._marks.append(
            f'<rect x="{left:g}" y="{min(top, bottom):g}" width="{max(0.0, right - left):.1f}" '
            f'height="{abs(bottom - top):.1f}" fill="{colour}">{_title(title)}</rect>'
        )

    def text(self, x: float, y: float, words: str, anchor: str = "start") -> None:
        self._marks.append(
            f'<text x="{self.px(x) + 5:g}" y="{self.py(y) + 4:g}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def render(self, name: str) -> str:
        """The whole `<svg>`; `name` is what a screen reader says."""
        head = f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(name, quote=True)}">'
        return "".join([head, *self._axes(), *self._marks, "</svg>"])

    def _axes(self) -> list[str]:
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        out = []
        xs = log_ticks(*self.x) if self.log_x else ticks(*self.x, count=max(3, self.width // 110))
        step = xs[1] - xs[0] if len(xs) > 1 and not self.log_x else 0.0
        for value in xs:
            at = self.px(value)
            out.append(f'<line class="grid" x1="{at:g}" y1="{TOP}" x2="{at:g}" y2="{bottom}"/>')
            out.append(f'<text x="{at:g}" y="{bottom + 16}" text-anchor="middle">{label(value, step)}</text>')
        out += self._y_axis(right)
        middle = (self.left + right) / 2
        out.append(f'<text class="axis" x="{middle:g}" y="{self.height - 8}" text-anchor="middle">')
        out.append(f"{escape(self.x_title)}</text>")
        if self.y_title:
            place = f'transform="translate(14 {(TOP + bottom) / 2:g}) rotate(-90)"'
            out.append(f'<text class="axis" {place} text-anchor="middle">{escape(self.y_title)}</text>')
        return out

    def _y_axis(self, right: int) -> list[str]:
        out = []
        values = [float(i) for i in range(len(self.y_names))] or ticks(*self.y, count=max(3, self.height // 60))
        step = values[1] - values[0] if len(values) > 1 else 0.0
        for i, value in enumerate(values):
            at = self.py(value)
            words = escape(self.y_names[i]) if self.y_names else label(value, step)
            out.append(f'<line class="grid" x1="{self.left}" y1="{at:g}" x2="{right}" y2="{at:g}"/>')
            out.append(f'<text x="{self.left - 6}" y="{at + 4:g}" text-anchor="end">{words}</text>')
        return out


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def padded(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """The range of the values with a little room on both sides."""
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    room = (high - low) * share or abs(high) * 0.05 or 1.0
    return low - room, high + room


def without_outliers(values: Iterable[float]) -> list[float]:
    """The values that are not far above the rest (three times the middle half's width above it)."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[3 * (len(ordered) - 1) // 4]
    return [value for value in ordered if value <= high + 3 * (high - low) or value <= ordered[len(ordered) // 2]]
