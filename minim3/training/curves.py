"""Line charts as SVG text, without a plotting library. Colours are CSS variables, so that the page chooses them."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 22, 10, 30
NUM_COLOURS = 8  # CSS variables --series-0 ... --series-7
MOST_POINTS = 500  # a longer series is drawn as means of neighbours

Series = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Series], *, percent: bool = False, from_zero: bool = False) -> str:
    """An `<svg>` of the series, points (x, y) by name, and a legend where there are several.

    The vertical axis is logarithmic where the positive values span more than two decades. Values that are not finite
    are left out. percent: the values are shares, the axis is labelled in per cent. from_zero: the axis begins at 0.
    """
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    drawn = {name: thin_out(points) for name, points in finite.items() if points}
    if not drawn:
        return '<p class="empty">nothing was logged</p>'
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    ys = [*ys, 0.0] if from_zero else ys
    logarithmic = not percent and min(ys) > 0 and max(ys) / min(ys) > 100
    ticks = _decades(min(ys), max(ys)) if logarithmic else linear_ticks(min(ys), max(ys))
    across = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    up = _Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, logarithmic)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in ticks:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = f"{tick:.0%}" if percent and ticks[1] - ticks[0] >= 0.01 else f"{tick:.1%}" if percent else number(tick)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for tick in linear_ticks(min(xs), max(xs), whole=True):
        if min(xs) <= tick <= max(xs):
            x = f"{across(tick):.1f}"
            parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(tick)}</text>')
    for place, (name, points) in enumerate(drawn.items()):
        colour = f"var(--series-{place % NUM_COLOURS})"
        dashes = ' stroke-dasharray="5 3"' if place // NUM_COLOURS % 2 else ""
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        last_x, last_y = points[-1]
        title = f"<title>{escape(name)}: {number(last_y)} at step {last_x:g}</title>"
        parts.append(f'<polyline{dashes} style="stroke:{colour}" points="{path}">{title}</polyline>')
        parts.append(f'<circle style="fill:{colour}" cx="{across(last_x):.1f}" cy="{up(last_y):.1f}" r="2.5"/>')
    parts.append("</svg>")
    if len(drawn) > 1:
        names = "".join(
            f'<li><i class="{"dashed" if place // NUM_COLOURS % 2 else "solid"}" '
            f'style="color:var(--series-{place % NUM_COLOURS})"></i>{escape(name)}</li>'
            for place, name in enumerate(drawn)
        )
        parts.append(f'<ul class="legend">{names}</ul>')
    return "".join(parts)


def thin_out(points: Series, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of runs of neighbours, and the last point itself."""
    if len(points) <= most:
        return list(points)
    size = -(-(len(points) - 1) // (most - 1))
    means = []
    for start in range(0, len(points) - 1, size):
        run = points[start : min(start + size, len(points) - 1)]
        means.append((sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)))
    return [*means, points[-1]]


def linear_ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Four to eight round numbers that enclose `low` and `high`; whole numbers if asked."""
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def number(value: float) -> str:
    """A number as an axis shows it: 12k, 1.5M, 0.25, 3e-05."""
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (unit if name != 'k' else 1e3):.4g}{name}"
    return f"{value:.3g}" if size < 1000 else f"{value:.0f}"


def _decades(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high) - 1e-9) + 1)]


class _Scale:
    """From values to pixels."""

    def __init__(self, low: float, high: float, first: float, last: float, logarithmic: bool = False) -> None:
        self.transform = math.log10 if logarithmic else float
        self.low, self.first = self.transform(low), first
        self.span, self.pixels = (self.transform(high) - self.low) or 1.0, last - first

    def __call__(self, value: float) -> float:
        # Divided first: pixels over a span near the smallest of numbers would be infinite.
        return self.first + (self.transform(value) - self.low) / self.span * self.pixels
