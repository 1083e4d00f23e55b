"""report.html, written while the run goes on: bounded, and never the end of a run."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from train.config import Options
from train.engine.evaluator import Evaluation
from train.engine.observers import StepReport
from train.report.media import Bounds, Place, Shown
from train.report.report import write_report
from train.report.verdict import State

log = logging.getLogger(__name__)

_BOUNDS = Bounds(seconds=3.0, processes=1)
"""Of a page's reading of images and clips; those that it has are kept for the next."""

_SHARE = 0.05
"""Share of the run's time that pages may take, the first and the last aside; a page that would take more waits."""


class Reporter:
    """Writes the page after each evaluation, and at the end; a fault in it is a warning."""

    def __init__(self, folder: Path, options: Options, *, step: int, total_steps: int):
        self.folder, self.options = folder, options
        self._step, self._total_steps = step, total_steps
        self._media: Mapping[Place, list[Shown]] = {}
        self._cost_s, self._ended = 0.0, time.monotonic()

    def on_step(self, report: StepReport) -> None:
        """Note how far the run is."""
        self._step = report.step

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Write the page, unless the pages before took too long."""
        if self._cost_s <= _SHARE * (time.monotonic() - self._ended):
            self.write(State.running)

    def close(self, *, failed: bool) -> None:
        """Write the page of a run that has come to an end."""
        is_done = self._step >= self._total_steps
        self.write(State.failed if failed else State.finished if is_done else State.unfinished)

    def write(self, state: State) -> None:
        """Write the page now."""
        began = time.monotonic()
        try:
            self._media = write_report(self.folder, self.options, state=state, bounds=_BOUNDS, known=self._media).media
        except Exception as error:  # whatever it is: a page is no reason to lose a run
            log.warning(
                "report.html could not be written (%s); the run goes on, and `omnitune report %s` writes it",
                error,
                self.folder,
            )
        self._ended = time.monotonic()
        self._cost_s = self._ended - began
