"""Curves as shapes that a template draws in SVG: thinned, with scales, and with the figures to read at each place."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

import numpy as np

from train.pages.page import figure

PLACES = 200
"""Places along a chart: with more steps than this, a place is the mean of several."""

COLOURS = 10
"""Curves of a chart that have colours of their own, the most that are drawn."""

LEFT, RIGHT, TOP, BOTTOM = 46.0, 396.0, 8.0, 168.0
"""Where the curves lie in the chart's box of 400 by 190."""

_DOTS = 30
"""Most places at which dots are drawn."""

_LOGARITHMIC = 30
"""The largest value over the smallest, from which on the scale is logarithmic."""


@dataclass(frozen=True)
class Series:
    """A named curve: float (n,) steps, ascending, and the value at each; NaN where there is none."""

    name: str
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Line:
    """A drawn curve: SVG paths of its means, of the band from lowest to highest, and of dots where there are few
    places; and its last value."""

    name: str
    path: str
    band: str
    dots: str
    last: float


@dataclass(frozen=True)
class Place:
    """A strip of the chart, and the words for what is there."""

    left: float
    width: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A drawn chart; ticks are (place, words)."""

    title: str
    lines: list[Line]
    places: list[Place]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    left_out: int
    """curves beyond the first `COLOURS`"""


def chart(title: str, curves: Sequence[Series], *, from_zero: bool = False) -> Chart | None:
    """A chart of the curves that have a value; None where none has.

    from_zero: let the scale begin at 0; otherwise it spans the values, by their logarithm where they differ widely.
    """
    held = [curve for curve in curves if np.isfinite(curve.values).any()]
    if not held:
        return None
    drawn = held[:COLOURS]
    edges = _edges(np.unique(np.concatenate([curve.steps for curve in drawn])))
    means, lows, highs = zip(*(_at_places(curve, edges) for curve in drawn), strict=True)
    low, high = float(np.nanmin(np.stack(lows))), float(np.nanmax(np.stack(highs)))
    is_log = not from_zero and low > 0 and high / low > _LOGARITHMIC
    bottom, top = _bounds(0.0 if from_zero else low, high, is_log)
    centres = [(first + last) / 2 for first, last in edges]
    x = _scale(centres, edges[0][0], edges[-1][1], LEFT, RIGHT)

    def y(values: np.ndarray) -> np.ndarray:
        return _scale(np.log10(values) if is_log else values, bottom, top, BOTTOM, TOP)

    lines = [
        Line(curve.name, _path(x, y(mean)), _band(x, y(lower), y(upper)), _dots(x, y(mean)), _last(curve.values))
        for curve, mean, lower, upper in zip(drawn, means, lows, highs, strict=True)
    ]
    y_ticks = _log_ticks(bottom, top) if is_log else _ticks(bottom, top)
    places_y = _scale([tick for tick, _ in y_ticks], bottom, top, BOTTOM, TOP)
    x_ticks = _ticks(edges[0][0], edges[-1][1])
    places_x = _scale([tick for tick, _ in x_ticks], edges[0][0], edges[-1][1], LEFT, RIGHT)
    return Chart(
        title,
        lines,
        _places(drawn, means, edges, x),
        [(float(place), words) for place, (_, words) in zip(places_x, x_ticks, strict=True)],
        [(float(place), words) for place, (_, words) in zip(places_y, y_ticks, strict=True)],
        len(held) - len(drawn),
    )


def _edges(steps: np.ndarray) -> list[tuple[float, float]]:
    """First and last step of each place."""
    groups = [steps[i : i + 1] for i in range(len(steps))] if len(steps) <= PLACES else np.array_split(steps, PLACES)
    return [(float(group[0]), float(group[-1])) for group in groups]


def _at_places(curve: Series, edges: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lowest and highest value at each place; NaN where there is none."""
    begins = np.searchsorted(curve.steps, [first for first, _ in edges])
    ends = np.searchsorted(curve.steps, [last for _, last in edges], side="right")
    found = np.full((3, len(edges)), np.nan)
    for place, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        values = curve.values[begin:end]
        values = values[np.isfinite(values)]
        if len(values):
            found[:, place] = values.mean(), values.min(), values.max()
    return found[0], found[1], found[2]


def _bounds(low: float, high: float, is_log: bool) -> tuple[float, float]:
    if is_log:
        low, high = log10(low), log10(high)
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return (low if low == 0 else low - margin), high + margin


def _scale(values: Sequence[float] | np.ndarray, low: float, high: float, to_low: float, to_high: float) -> np.ndarray:
    share = (np.asarray(values, float) - low) / (high - low) if high > low else np.full(len(values), 0.5)
    return to_low + share * (to_high - to_low)


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round numbers between the bounds, about four of them."""
    if high <= low:
        return [(low, figure(low))]
    rough = (high - low) / 4
    size = 10.0 ** floor(log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    values = [number * step for number in range(ceil(low / step), floor(high / step) + 1)]
    return [(value, figure(value)) for value in values]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten between the bounds, which are logarithms; with 2 and 5 times them where they are few."""
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    values = [factor * 10.0**power for power in range(floor(low), ceil(high) + 1) for factor in factors]
    apart = max(1, ceil((high - low) / 6))
    if len(factors) == 1:
        values = [value for value in values if round(log10(value)) % apart == 0]
    return [(log10(value), figure(value)) for value in values if low <= log10(value) <= high]


def _path(x: np.ndarray, y: np.ndarray) -> str:
    there = np.isfinite(y)
    return "M" + " L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x[there], y[there], strict=True))


def _band(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    there = np.isfinite(low)
    if (low[there] == high[there]).all():
        return ""
    up = [f"{a:.1f} {b:.1f}" for a, b in zip(x[there], high[there], strict=True)]
    down = [f"{a:.1f} {b:.1f}" for a, b in zip(x[there], low[there], strict=True)]
    return "M" + " L".join(up + down[::-1]) + " Z"


def _dots(x: np.ndarray, y: np.ndarray) -> str:
    there = np.isfinite(y)
    if there.sum() > _DOTS:
        return ""
    return " ".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x[there], y[there], strict=True))


def _last(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)][-1])


def _places(
    curves: Sequence[Series], means: Sequence[np.ndarray], edges: list[tuple[float, float]], x: np.ndarray
) -> list[Place]:
    middles = (x[1:] + x[:-1]) / 2
    bounds = np.concatenate([[LEFT], middles, [RIGHT]])
    made = []
    for place, (first, last) in enumerate(edges):
        where = f"step {first:.0f}" if first == last else f"mean of steps {first:.0f} to {last:.0f}"
        values = [(curve.name, mean[place]) for curve, mean in zip(curves, means, strict=True)]
        said = ", ".join(f"{name} {figure(value)}" for name, value in values if value == value)
        made.append(Place(float(bounds[place]), float(bounds[place + 1] - bounds[place]), f"{where}: {said}"))
    return made
