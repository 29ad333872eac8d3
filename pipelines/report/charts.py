"""Charts as SVG inside a page. Their colours are the page's CSS variables; each bar has its value as a
tooltip."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from unicodedata import east_asian_width

import numpy as np
from numpy.typing import NDArray

from pipelines.formatting import printable

_WIDTH = 460  # units of the view box: the chart takes the width of its column
_ROW = 24
_LABEL = 168  # units for the names of bars
_VALUE = 74  # units for the values beside bars
_LONGEST = 20  # columns of a name


def bar_chart(names: Sequence[str], values: Sequence[float], format_value: Callable[[float], str]) -> str:
    """A horizontal bar for each name, in order, with its value beside it."""
    most = max(max(values, default=0), 1e-9)
    space = _WIDTH - _LABEL - _VALUE
    parts = []
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        top, length = number * _ROW, max(1.5, space * value / most) if value else 0
        shown = escaped(_shortened(name))
        text = escaped(format_value(value))
        parts.append(
            f"<g><title>{escaped(name)}: {text}</title>"
            f'<text class="name" x="{_LABEL - 8}" y="{top + 16}" text-anchor="end">{shown}</text>'
            f'<rect class="bar" x="{_LABEL}" y="{top + 4}" width="{length:.1f}" height="{_ROW - 8}" rx="2"/>'
            f'<text class="value" x="{_LABEL + length + 6:.1f}" y="{top + 16}">{text}</text></g>'
        )
    return _svg(parts, _ROW * len(names) + 2)


def histogram(
    values: NDArray[np.floating] | NDArray[np.integer], format_value: Callable[[float], str], unit: str
) -> str:
    """Vertical bars of equal width. Values beyond the 99th percentile are in the last bar, and said to be.

    unit: below the axis.
    """
    low, high, end = (float(number) for number in (values.min(), np.percentile(values, 99), values.max()))
    beyond = end > high > low
    counts, edges = np.histogram(np.minimum(values, high), _bins(values, low, high))
    height, bottom, left = 150, 168, 8
    width = (_WIDTH - 2 * left) / len(counts)
    most = max(int(counts.max()), 1)
    parts = [f'<line class="axis" x1="{left}" x2="{_WIDTH - left}" y1="{bottom}" y2="{bottom}"/>']
    for number, count in enumerate(counts.tolist()):
        tall = max(1.5, height * count / most) if count else 0
        last = number == len(counts) - 1
        begin, stop = format_value(edges[number]), format_value(end if last else edges[number + 1])
        parts.append(
            f"<g><title>{begin} to {stop}: {count:,}</title>"
            f'<rect class="bar{" more" * (last and beyond)}" x="{left + number * width + 0.5:.1f}" '
            f'y="{bottom - tall:.1f}" width="{max(width - 1, 0.5):.1f}" height="{tall:.1f}" rx="1"/></g>'
        )
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        text = format_value(low + share * (edges[-1] - edges[0]))
        if share == 1 and beyond:
            text = f"{text} and more, to {format_value(end)}"
        x = left + share * (_WIDTH - 2 * left)
        parts.append(
            f'<text class="value" x="{x:.1f}" y="{bottom + 17}" text-anchor="{anchor}">{escaped(text)}</text>'
        )
    parts.append(
        f'<text class="name" x="{_WIDTH / 2}" y="{bottom + 35}" text-anchor="middle">{escaped(unit)}</text>'
    )
    return _svg(parts, bottom + 42)


def ranked_curve(values: NDArray[np.integer], noun: str) -> str:
    """The values in descending order as an area: for more classes than bars can show."""
    ordered = np.sort(values)[::-1]
    height, bottom, left = 150, 168, 8
    most = max(int(ordered[0]), 1)
    right = _WIDTH - left
    step = (right - left) / len(ordered)
    points = [f"M{left},{bottom}"]
    for number, value in enumerate(ordered.tolist()):
        y = bottom - height * value / most
        points.append(f"L{left + number * step:.1f},{y:.1f}H{left + (number + 1) * step:.1f}")
    middle, least = int(np.median(ordered)), int(ordered[-1])
    y = bottom - height * middle / most
    parts = [
        f'<path class="bar" d="{"".join(points)}V{bottom}Z"/>',
        f'<line class="mark" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<text class="value" x="{right}" y="{y - 5:.1f}" text-anchor="end">median {middle:,}</text>',
        f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>',
        f'<text class="value" x="{left}" y="{bottom + 17}">most: {most:,}</text>',
        f'<text class="value" x="{right}" y="{bottom + 17}" text-anchor="end">least: {least:,}</text>',
        f'<text class="name" x="{_WIDTH / 2}" y="{bottom + 35}" text-anchor="middle">{escaped(noun)}</text>',
    ]
    return _svg(parts, bottom + 42)


def escaped(text: str) -> str:
    """Text of any origin for the page."""
    return html.escape(printable(text))


def _shortened(name: str) -> str:
    """The beginning of a name that fits beside its bar; Chinese characters and the like count as two."""
    columns = np.cumsum([2 if east_asian_width(each) in "WF" else 1 for each in name])
    if not len(columns) or columns[-1] <= _LONGEST:
        return name
    return f"{name[: int(np.searchsorted(columns, _LONGEST - 1, side='right'))]}…"


def _bins(values: NDArray[np.floating] | NDArray[np.integer], low: float, high: float) -> NDArray[np.float64]:
    if high <= low:
        return np.array([low, low + 1])
    count = 30
    if np.issubdtype(values.dtype, np.integer):  # whole numbers in each bin equally many
        width = max(1, -(-int(high - low + 1) // count))
        return np.arange(low, high + width + 1, width) - 0.0
    return np.linspace(low, high, count + 1)


def _svg(parts: Sequence[str], height: float) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'
