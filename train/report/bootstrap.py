"""How sure a difference between two runs is, from the held-out records that both answered."""

from dataclasses import dataclass

import numpy as np

SAMPLES = 10_000
"""Resamples of the records."""

CONFIDENCE = 0.95

_AT_ONCE = 4_000_000
"""Counts that are held at a time."""


@dataclass(frozen=True)
class Interval:
    """A difference, and the bounds between which it lies with a confidence of 95 %."""

    difference: float
    low: float
    high: float


def paired_interval(first: np.ndarray, second: np.ndarray, *, samples: int = SAMPLES, seed: int = 0) -> Interval:
    """The difference of a metric, second less first, with its paired bootstrap interval (percentiles).

    A metric is the sum of scores ÷ the sum of weights. Records are drawn again, with replacement, the same ones for
    both runs. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993).

    Args:
        first, second: float (n, 2), score and weight of each record, in the same order.
    """
    table = np.concatenate([first, second], axis=1)
    count = len(table)
    draw = np.random.default_rng(seed)
    found = []
    for begin in range(0, samples, size := max(1, _AT_ONCE // count)):
        drawn = draw.multinomial(count, np.full(count, 1 / count), size=min(size, samples - begin))
        found.append(_difference(drawn @ table))
    differences = np.concatenate(found)
    outside = 50 * (1 - CONFIDENCE)
    low, high = np.nanpercentile(differences, [outside, 100 - outside])
    return Interval(float(_difference(table.sum(axis=0, keepdims=True))[0]), float(low), float(high))


def _difference(sums: np.ndarray) -> np.ndarray:
    """Of (m, 4) sums of scores and weights; NaN where no weight was drawn."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1]
