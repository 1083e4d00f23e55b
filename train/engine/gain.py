"""Whether evaluations still gain: the best value of a figure, and how many evaluations came after it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from train.config import METRICS


@dataclass
class Gain:
    """Follows a figure of the evaluations; figure: "" = none, then nothing is ever a gain."""

    figure: str
    best: float | None = None
    without: int = 0
    """evaluations in a row that were no gain"""

    def add(self, values: Mapping[str, float]) -> bool:
        """Whether an evaluation is better than all before it."""
        value = values.get(self.figure)
        if not is_better(self.figure, value, than=self.best):
            self.without += 1
            return False
        self.best, self.without = value, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"figure": self.figure, "best": self.best, "without": self.without}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; anew where another figure was followed, whose values say nothing of this one's."""
        if state["figure"] == self.figure:
            self.best, self.without = state["best"], state["without"]


def is_better(figure: str, value: float | None, *, than: float | None) -> bool:
    """Whether a value of an evaluation's figure is better; of what is no metric of answers, the lower one.

    than: None = there is none yet. What is no number is never better.
    """
    if value is None or not isfinite(value):
        return False
    is_high = METRICS.get(figure.removeprefix("eval/").partition("/")[0], False)
    return than is None or (value > than if is_high else value < than)
