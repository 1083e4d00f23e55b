"""What all trackers share: they take what metrics.jsonl has, under the same names, and their failure is a warning."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from train.config import TrackerOptions
from train.engine.evaluator import Evaluation
from train.engine.observers import StepReport
from train.run_folder import RunFolder
from train.schema import Record

log = logging.getLogger(__name__)

Figures = Mapping[str, float]
Answers = Sequence[Mapping[str, Any]]
"""Lines of predictions/."""


@dataclass(frozen=True)
class TrackedRun:
    """What trackers know of a run.

    config: the options as plain values.
    since: the last step of an earlier life of this run that is kept; -1 where it begins anew. metrics.jsonl then holds
    the lines up to there, and no others.
    record_of: the held-out record of a file and a line, None where there is none; None where no records are held out.
    """

    name: str
    folder: RunFolder
    options: TrackerOptions
    config: Mapping[str, Any]
    since: int = -1
    record_of: Callable[[str, int], Record | None] | None = None

    def history(self) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, figures) of each line of metrics.jsonl."""
        file = self.folder.metrics
        lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
        for line in filter(None, lines):
            values = json.loads(line)
            step = int(values.pop("step"))
            yield step, {name: math.nan if value is None else value for name, value in values.items()}

    def answers(self, step: int) -> Answers:
        """The answers of the evaluation after a step."""
        file = self.folder.predictions / f"step-{step:06d}.jsonl"
        lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
        return [json.loads(line) for line in lines if line]


class Tracker(Protocol):
    """Where the figures of a run go. What its methods raise ends the tracking, not the run."""

    def __init__(self, run: TrackedRun): ...

    def log(self, step: int, figures: Figures) -> None:
        """Take the figures of a step or of an evaluation."""

    def log_answers(self, step: int, answers: Answers) -> None:
        """Take the answers of an evaluation."""

    def close(self, *, failed: bool) -> None:
        """Finish the run."""


class Tracking:
    """Observer that hands each step and evaluation to a tracker; once that fails, the run goes on untracked by it.

    name: for messages. start: makes the tracker, which then shows all that metrics.jsonl holds already.
    """

    def __init__(self, name: str, start: Callable[[], Tracker]):
        self.name = name
        self._tracker: Tracker | None = None
        try:
            self._tracker = start()
        except Exception as error:
            self._give_up(error)

    def on_step(self, report: StepReport) -> None:
        """Log the step."""
        figures = report.to_dict()
        step = int(figures.pop("step"))
        self._try(lambda tracker: tracker.log(step, figures))

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Log the evaluation with its step, and its answers."""
        answers = list(map(asdict, evaluation.predictions))
        self._try(lambda tracker: tracker.log(step, evaluation.values))
        if answers:
            self._try(lambda tracker: tracker.log_answers(step, answers))

    def close(self, *, failed: bool) -> None:
        """Finish the run."""
        self._try(lambda tracker: tracker.close(failed=failed))

    def _try(self, what: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            what(self._tracker)
        except Exception as error:  # whatever it is: a tracker is no reason to lose a run
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._tracker = None
        log.warning("%s failed (%s); the run goes on untracked, metrics.jsonl has everything", self.name, error)


def kept_id(file: Path) -> str | None:
    """The id of a run that a tracker left in a file; None where there is none."""
    return file.read_bytes().decode(errors="replace").strip() if file.exists() else None


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of options in groups, `run.seed` and the like."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
