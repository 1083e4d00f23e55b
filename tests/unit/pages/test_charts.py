"""Curves as shapes."""

import re

import numpy as np
import pytest

from train.pages.charts import BOTTOM, LEFT, PLACES, RIGHT, TOP, Series, chart
from train.pages.page import figure


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]


def test_few_steps_are_drawn_one_by_one() -> None:
    made = chart("loss", [Series("all", np.array([1.0, 2, 3]), np.array([4.0, 2, 3]))])
    assert made
    assert [place.text for place in made.places] == ["step 1: all 4", "step 2: all 2", "step 3: all 3"]
    [line] = made.lines
    (x0, y0), (x1, y1), (x2, y2) = points(line.path)
    assert (x0, x1, x2) == (LEFT, (LEFT + RIGHT) / 2, RIGHT)
    assert TOP < y0 < y2 < y1 < BOTTOM
    assert (y2 - y0) / (y1 - y0) == pytest.approx(0.5, abs=0.01)
    assert line.band == ""
    assert line.last == 3


def test_many_steps_become_means_with_a_band_that_keeps_the_spikes() -> None:
    values = np.ones(10_000)
    values[7_777] = 2
    made = chart("loss", [Series("all", np.arange(10_000.0), values)])
    assert made
    assert len(made.places) == PLACES
    assert made.places[0].text == "mean of steps 0 to 49: all 1"
    assert made.places[155].text == "mean of steps 7750 to 7799: all 1.02"
    [line] = made.lines
    assert len(points(line.path)) == PLACES
    assert min(y for _, y in points(line.band)) < min(y for _, y in points(line.path))


def test_widely_different_values_get_a_logarithmic_scale() -> None:
    made = chart("loss", [Series("all", np.arange(3.0), np.array([100.0, 10, 1]))])
    assert made
    heights = [y for _, y in points(made.lines[0].path)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert [words for _, words in made.y_ticks] == ["1", "2", "5", "10", "20", "50", "100"]


def test_what_is_not_finite_is_left_out() -> None:
    nothing = Series("never", np.arange(3.0), np.full(3, np.nan))
    assert chart("loss", [nothing]) is None
    made = chart("loss", [Series("all", np.arange(3.0), np.array([1.0, np.nan, 3])), nothing])
    assert made
    assert [line.name for line in made.lines] == ["all"]
    assert [place.text for place in made.places] == ["step 0: all 1", "step 1: ", "step 2: all 3"]


def test_curves_at_other_steps_share_the_places() -> None:
    made = chart("loss", [Series("a", np.array([0.0, 10]), np.ones(2)), Series("b", np.array([5.0]), np.ones(1))])
    assert made
    assert [place.text for place in made.places] == ["step 0: a 1", "step 5: b 1", "step 10: a 1"]


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.123456, "0.1235"), (123456.7, "123,457"), (0, "0"), (2.5e-9, "2.5e-09"), (float("nan"), "-"), (None, "-")],
)
def test_a_figure_has_four_digits_that_count(value: float | None, said: str) -> None:
    assert figure(value) == said
