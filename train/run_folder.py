"""The names in a run's folder."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """What a run leaves in its folder, by what it is."""

    path: Path

    @property
    def config(self) -> Path:
        """The run's options."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, commit, command, ranks and device."""
        return self.path / "environment.json"

    @property
    def initial_model(self) -> Path:
        """The random model that the run started from, where it did."""
        return self.path / "initial_model"

    @property
    def metrics(self) -> Path:
        """A line for each step and each evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """A folder for each checkpoint that is kept."""
        return self.path / "checkpoints"

    @property
    def predictions(self) -> Path:
        """A file of answers for each evaluation."""
        return self.path / "predictions"

    @property
    def quarantine(self) -> Path:
        """The records that could not be used, with their reasons."""
        return self.path / "quarantine.jsonl"

    @property
    def trace(self) -> Path:
        """The profile of `debug.profile_steps`."""
        return self.path / "trace.json"

    @property
    def export(self) -> Path:
        """The model folder that was trained."""
        return self.path / "export"
