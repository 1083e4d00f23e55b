"""TensorBoard: event files in the run's folder."""

from train.engine.tracking.tracker import Answers, Figures, TrackedRun, flat

_FLUSH_S = 10
"""Seconds after which what was logged is on the disk."""


class TensorBoardTracker:
    """Writes an event file for each life of a run; TensorBoard shows them as one curve.

    `purge_step` hides the steps of earlier files that this life repeats.
    """

    def __init__(self, run: TrackedRun):
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder.path / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=run.since + 1, flush_secs=_FLUSH_S)
        if run.since < 0:
            lines = [f"    {name}: {value}" for name, value in flat(run.config)]
            self._writer.add_text("config", "\n".join(lines), 0)

    def log(self, step: int, figures: Figures) -> None:
        """Add a point to each figure's curve."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def log_answers(self, step: int, answers: Answers) -> None:
        """Nothing: it has no tables."""

    def close(self, *, failed: bool) -> None:
        """Write what is left."""
        self._writer.close()
