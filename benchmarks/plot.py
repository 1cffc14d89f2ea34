"""Line charts as SVG, for figures that grow with the number of streams."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil, floor, log2, log10
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT, MARGIN = 420, 300, 56
COLOURS = ("#1f6feb", "#d1242f", "#2da44e", "#8250df")
GREY = "#6e7781"


class Chart(NamedTuple):
    """One chart: a value of each series for each of `xs`, whose axis is logarithmic."""

    title: str
    x_label: str
    xs: Sequence[float]
    series: Mapping[str, Sequence[float]]


def write_charts(path: Path, charts: Sequence[Chart]) -> None:
    """Write charts side by side."""
    width = WIDTH * len(charts)
    body = "".join(
        f'<g transform="translate({number * WIDTH} 0)">{_draw(chart)}</g>'
        for number, chart in enumerate(charts)
    )
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" '
        f'font-family="sans-serif" font-size="11"><rect width="{width}" height="{HEIGHT}" fill="white"/>'
        f"{body}</svg>\n"
    )


def _draw(chart: Chart) -> str:
    step, steps = _scale(max(max(values) for values in chart.series.values()))
    span = log2(chart.xs[-1] / chart.xs[0]) or 1.0

    def x(value: float) -> float:
        return MARGIN + (WIDTH - 1.5 * MARGIN) * log2(value / chart.xs[0]) / span

    def y(value: float) -> float:
        return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * value / (step * steps)

    parts = [_text(WIDTH / 2, 20, chart.title, size=13), _text(WIDTH / 2, HEIGHT - 16, chart.x_label)]
    for value in (step * number for number in range(steps + 1)):
        parts.append(_line(x(chart.xs[0]), y(value), x(chart.xs[-1]), y(value), "#d8dee4"))
        parts.append(_text(MARGIN - 6, y(value) + 4, f"{value:g}", anchor="end", colour=GREY))
    parts += [_text(x(value), HEIGHT - MARGIN + 16, f"{value:g}", colour=GREY) for value in chart.xs]
    legend_x = float(MARGIN)
    for colour, (name, values) in zip(COLOURS, chart.series.items(), strict=False):
        points = [(x(at), y(value)) for at, value in zip(chart.xs, values, strict=True)]
        parts += [_line(*one, *other, colour, 2) for one, other in pairwise(points)]
        parts += [f'<circle cx="{at:.1f}" cy="{to:.1f}" r="3" fill="{colour}"/>' for at, to in points]
        parts.append(_text(legend_x, MARGIN - 14, name, anchor="start", colour=colour))
        legend_x += 7 * len(name) + 16
    return "".join(parts)


def _scale(top: float) -> tuple[float, int]:
    """Return a round step, and how many of it reach `top`: four to ten."""
    unit = 10 ** floor(log10(top or 1)) / 10
    step = next(unit * factor for factor in (1, 2, 5, 10, 20) if top <= unit * factor * 10)
    return (step, ceil(top / step)) if top else (1.0, 1)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def _text(
    x: float, y: float, text: str, *, size: int = 11, anchor: str = "middle", colour: str = "#1f2328"
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f"<text {place}>{text}</text>"
