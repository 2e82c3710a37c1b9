"""Charts as SVG: axes, lines, points with intervals, histograms. Small enough to read on a phone.

A chart is drawn at the size of a phone's column, so that its letters stay legible there, and takes
its colours from chart.css: the page's dark mode is the chart's. Marks carry a role, which is their
CSS class: base, concise_prompt, student, teacher.
"""

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 320, 220  # units of the drawing
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 10, 44, 36  # margins around the plot
_EDGE = 14  # of paper around a chart that is a file of its own

Range = tuple[float, float]
Interval = tuple[float, float] | None


class Chart:
    """One pair of axes; marks are drawn in the order of the calls.

    Args:
      title: above the plot, and the chart's name for those who do not see it.
      x, y: ranges of the axes; the ends of y are rounded outwards to whole ticks.
    """

    def __init__(self, title: str, x_label: str, x: Range, y: Range):
        self.title = title
        self._x_label = x_label
        self._x_ticks, self._y_ticks = ticks(*x, 5), ticks(*y, 5)
        self._x = x if x[0] < x[1] else (self._x_ticks[0], self._x_ticks[-1])
        self._y = self._y_ticks[0], self._y_ticks[-1]
        self._marks: list[str] = []
        self._legend: list[tuple[str, str]] = []

    def _px(self, value: float) -> float:
        low, high = self._x
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def _py(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def legend(self, role: str, label: str) -> None:
        """Names a role above the plot."""
        self._legend.append((role, label))

    def line(self, role: str, points: Sequence[tuple[float, float]]) -> None:
        """Joins points; what is not finite leaves a gap."""
        self._path(f"line {role}", points)

    def area(self, role: str, points: Sequence[tuple[float, float]]) -> None:
        """Fills what lies under a line down to zero."""
        closed = [(points[0][0], 0.0), *points, (points[-1][0], 0.0)]
        self._path(f"area {role}", closed)

    def _path(self, classes: str, points: Sequence[tuple[float, float]]) -> None:
        steps, pen = [], "M"
        for x, y in points:
            if math.isfinite(x) and math.isfinite(y):
                steps.append(f"{pen}{self._px(x):.1f} {self._py(y):.1f}")
                pen = "L"
            else:
                pen = "M"
        self._marks.append(f'<path class="{classes}" d="{"".join(steps)}"/>')

    def point(
        self,
        role: str,
        x: float,
        y: float,
        note: str,
        x_interval: Interval = None,
        y_interval: Interval = None,
    ) -> None:
        """A point with whiskers; `note` shows where the mouse rests on it."""
        parts = [f"<title>{html.escape(note)}</title>"]
        px, py = self._px(x), self._py(y)
        if x_interval:
            left, right = (self._px(end) for end in x_interval)
            parts.append(f'<path class="whisker" d="M{left:.1f} {py:.1f}H{right:.1f}"/>')
        if y_interval:
            low, high = (self._py(end) for end in y_interval)
            parts.append(f'<path class="whisker" d="M{px:.1f} {low:.1f}V{high:.1f}"/>')
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4"/>')
        self._marks.append(f'<g class="point {role}">{"".join(parts)}</g>')

    def label(self, role: str, x: float, y: float, text: str) -> None:
        """Text beside a point, to its right and a little below."""
        self._marks.append(
            f'<text class="{role}" x="{self._px(x) + 8:.1f}" y="{self._py(y) + 14:.1f}">'
            f"{html.escape(text)}</text>"
        )

    def rules(self, xs: Sequence[float]) -> None:
        """Vertical lines over the whole height."""
        top, bottom = _TOP, HEIGHT - _BOTTOM
        path = "".join(f"M{self._px(x):.1f} {top}V{bottom}" for x in xs)
        if path:
            self._marks.insert(0, f'<path class="rule" d="{path}"/>')

    def level(self, role: str, y: float) -> None:
        """A horizontal line over the whole width."""
        path = f"M{_LEFT} {self._py(y):.1f}H{WIDTH - _RIGHT}"
        self._marks.insert(0, f'<path class="line {role}" d="{path}"/>')

    def svg(self, style: str = "") -> str:
        """The drawing: to put into a page, or with `style` a file of its own, on paper."""
        name, x, width, height, head = html.escape(self.title), 0, WIDTH, HEIGHT, ""
        if style:
            x, width, height = -_EDGE, WIDTH + 2 * _EDGE, HEIGHT + 2 * _EDGE
            head = (
                f"<style>{style}</style>"
                f'<rect class="paper" x="{x}" y="{x}" width="{width}" height="{height}"/>'
            )
        body = "".join([*self._axes(), *self._marks, *self._names()])
        size = f'width="{2 * width}" height="{2 * height}" ' if style else ""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" {size}'
            f'aria-label="{name}" viewBox="{x} {x} {width} {height}">'
            f'{head}<text class="title" x="0" y="13">{name}</text>{body}</svg>\n'
        )

    def _axes(self) -> list[str]:
        bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        parts = []
        for tick in self._y_ticks:
            y = self._py(tick)
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
            parts.append(
                f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
            )
        for tick in self._x_ticks:
            if self._x[0] <= tick <= self._x[1]:
                x = self._px(tick)
                parts.append(
                    f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">'
                    f"{number(tick)}</text>"
                )
        parts.append(
            f'<text class="label" x="{right}" y="{HEIGHT - 6}" text-anchor="end">'
            f"{html.escape(self._x_label)}</text>"
        )
        return parts

    def _names(self) -> list[str]:
        parts, x = [], 0.0
        for role, label in self._legend:
            parts.append(f'<path class="line {role}" d="M{x:.0f} 27h14"/>')
            parts.append(f'<text x="{x + 19:.0f}" y="31">{html.escape(label)}</text>')
            x += 19 + 6.1 * len(label) + 14  # about a letter's width at this size
        return parts


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers that enclose [low, high], about so many."""
    if not high > low:
        low, high = (low - 0.5 * abs(low), low + 0.5 * abs(low)) if low else (0.0, 1.0)
    raw = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= 0.999 * raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """A number as short as an axis wants it."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.6g}".replace("-", "\N{MINUS SIGN}")
