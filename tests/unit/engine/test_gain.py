"""When evaluations no longer gain."""

import pytest

from train.engine.gain import Gain


@pytest.mark.parametrize(
    ("figure", "values", "gains", "without"),
    [
        ("eval/loss", [3.0, 2.0, 2.0, 2.5, 1.9], [True, True, False, False, True], [0, 0, 1, 2, 0]),
        ("eval/exact_match", [0.1, 0.3, 0.2, 0.3, 0.4], [True, True, False, False, True], [0, 0, 1, 2, 0]),
        ("eval/loss", [float("nan"), 2.0, float("inf")], [False, True, False], [1, 0, 1]),
        ("", [1.0, 0.5], [False, False], [1, 2]),
    ],
)
def test_only_what_is_better_than_all_before_is_a_gain(
    figure: str, values: list[float], gains: list[bool], without: list[int]
) -> None:
    gain = Gain(figure)
    found = [(gain.add({figure: value, "eval/other": 9 - value} if figure else {}), gain.without) for value in values]
    assert found == list(zip(gains, without, strict=True))


def test_a_resumed_run_goes_on_counting() -> None:
    first, second = Gain("eval/loss"), Gain("eval/loss")
    for value in (2.0, 3.0):
        first.add({"eval/loss": value})
    second.load_state_dict(first.state_dict())
    assert not second.add({"eval/loss": 2.5})
    assert second.without == 2


def test_another_figure_begins_anew() -> None:
    first, second = Gain("eval/loss"), Gain("eval/f1")
    first.add({"eval/loss": 2.0})
    second.load_state_dict(first.state_dict())
    assert (second.best, second.without) == (None, 0)
