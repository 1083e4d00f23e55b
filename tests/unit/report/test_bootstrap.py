"""The paired bootstrap, against every resample there is, and against scipy."""

from itertools import product

import numpy as np
import pytest

from train.report.bootstrap import paired_interval


def of_pairs(*pairs: tuple[float, float]) -> np.ndarray:
    return np.array(pairs, float)


def by_hand(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The difference in every one of the n^n resamples."""
    found = []
    for rows in product(range(len(first)), repeat=len(first)):
        a, b = first[list(rows)].sum(axis=0), second[list(rows)].sum(axis=0)
        found.append(b[0] / b[1] - a[0] / a[1])
    return np.array(found)


def test_the_interval_is_that_of_all_resamples() -> None:
    first = of_pairs((1, 5), (0, 3), (4, 8), (2, 2), (0, 7))
    second = of_pairs((0, 5), (1, 3), (1, 8), (2, 2), (1, 7))
    low, high = np.percentile(by_hand(first, second), [2.5, 97.5])
    found = paired_interval(first, second, samples=200_000)
    assert found.difference == pytest.approx(5 / 25 - 7 / 25)
    assert found.low == pytest.approx(low, abs=0.005)
    assert found.high == pytest.approx(high, abs=0.005)


def test_two_records_of_which_one_gets_better() -> None:
    """Of the four resamples one has no gain, two have a half, one has a whole."""
    found = paired_interval(of_pairs((0, 1), (1, 1)), of_pairs((1, 1), (1, 1)))
    assert (found.difference, found.low, found.high) == (0.5, 0.0, 1.0)


def test_pairing_leaves_no_doubt_where_every_record_gains_as_much() -> None:
    first = np.column_stack([np.linspace(0, 0.5, 30), np.ones(30)])
    second = first + np.array([0.25, 0])
    found = paired_interval(first, second)
    assert (found.low, found.high) == (pytest.approx(0.25), pytest.approx(0.25))


def test_it_agrees_with_scipy() -> None:
    """scipy 1.17.1: bootstrap of the rows' indices, method="percentile", n_resamples=200,000, rng of seed 1."""
    ones = [1.0] * 12
    first = np.column_stack([[1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1], ones])
    second = np.column_stack([[1, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 1], ones])
    found = paired_interval(first, second)
    assert (found.difference, found.low, found.high) == pytest.approx((0.25, -1 / 12, 7 / 12))

    lengths = [5, 3, 8, 2, 7, 9, 1, 4]
    first = np.column_stack([[1, 0, 4, 2, 0, 3, 1, 0], lengths])
    second = np.column_stack([[0, 0, 2, 2, 1, 1, 0, 0], lengths])
    found = paired_interval(first, second)
    assert (found.difference, found.low, found.high) == pytest.approx((-0.1282051282051282, -0.25, 0.0), abs=0.004)


def test_it_is_drawn_from_a_seed() -> None:
    first, second = np.random.default_rng(0).integers(0, 2, (2, 40, 1)).astype(float)
    tables = [np.concatenate([scores, np.ones((40, 1))], axis=1) for scores in (first, second)]
    assert paired_interval(*tables) == paired_interval(*tables)
    assert paired_interval(*tables) != paired_interval(*tables, seed=1)
