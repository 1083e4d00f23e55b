"""MLflow: a server, or a store (sqlite) in the run's folder."""

import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.engine.tracking.tracker import Answers, Figures, TrackedRun, flat, kept_id

_MOST = 1000
"""Metrics that MLflow takes in one call."""

_MOST_OPTIONS = 100
"""Parameters that it takes in one call."""

_PATIENCE_S = 5.0
"""Seconds after which what was logged is sent: a call takes as long as a small step."""

_LONGEST = 6000
"""Characters of a parameter's value at most."""


class MlflowTracker:
    """Sends figures to MLflow at `MLFLOW_TRACKING_URI`, or else to mlflow/mlflow.db in the run's folder.

    MLflow cannot take back what it was sent. So a run that goes on where it was left goes on in MLflow too, and one
    that repeats steps becomes a new run there with all figures so far; the old one goes to MLflow's trash.
    """

    def __init__(self, run: TrackedRun):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        for library in ("mlflow", "alembic"):
            logging.getLogger(library).setLevel(logging.WARNING)
        folder = run.folder.path / "mlflow"
        folder.mkdir(exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder.absolute() / 'mlflow.db'}")
        self._pending: list[Any] = []
        self._sent = time.monotonic()
        last_step, last_evaluation = self._open(
            run, folder, None if uri else (folder / "artifacts").absolute().as_uri()
        )
        for step, figures in run.history():
            if step > (last_step if "loss" in figures else last_evaluation):
                self.log(step, figures)
        self._send()

    def log(self, step: int, figures: Figures) -> None:
        """Send the figures, in a few seconds at the latest."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        names = {re.sub(r"[^\w.\- :/]", "_", name): value for name, value in figures.items()}
        self._pending += [Metric(name, float(value), now, step) for name, value in names.items()]
        if time.monotonic() - self._sent > _PATIENCE_S or len(self._pending) > _MOST:
            self._send()

    def log_answers(self, step: int, answers: Answers) -> None:
        """Nothing: predictions/ has them."""

    def close(self, *, failed: bool) -> None:
        """Send what is left, and say how it ended."""
        self._send()
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")

    def _send(self) -> None:
        pending, self._pending = self._pending, []
        for start in range(0, len(pending), _MOST):
            self._client.log_batch(self._run_id, metrics=pending[start : start + _MOST])
        self._sent = time.monotonic()

    def _open(self, run: TrackedRun, folder: Path, artifacts: str | None) -> tuple[int, int]:
        """Choose the run in MLflow; returns the last step and the last evaluation that it has."""
        file = folder / "run_id"
        if old := self._held(kept_id(file)):
            last = self._last(old, "loss"), self._last(old, "eval/loss")
            if max(last) <= run.since:
                self._run_id = old
                self._client.update_run(old, status="RUNNING")
                return last
            self._client.delete_run(old)
        experiment = self._client.get_experiment_by_name(run.options.project)
        number = experiment.experiment_id if experiment else None
        if number is None:
            number = self._client.create_experiment(run.options.project, artifact_location=artifacts)
        tags = dict.fromkeys(run.options.tags, "")
        self._run_id = self._client.create_run(number, run_name=run.name, tags=tags).info.run_id
        file.write_text(self._run_id)
        self._log_options(run.config)
        return -1, -1

    def _log_options(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        options = [Param(name, str(value)[:_LONGEST]) for name, value in flat(config)]
        for start in range(0, len(options), _MOST_OPTIONS):
            self._client.log_batch(self._run_id, params=options[start : start + _MOST_OPTIONS])

    def _held(self, run_id: str | None) -> str | None:
        """The id, where MLflow has such a run that was not deleted."""
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_run(run_id) if run_id else None
        except MlflowException:  # another store, or no id
            return None
        return run_id if found and found.info.lifecycle_stage == "active" else None

    def _last(self, run_id: str, figure: str) -> int:
        return max((metric.step for metric in self._client.get_metric_history(run_id, figure)), default=-1)
