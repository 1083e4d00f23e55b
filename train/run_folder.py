"""The names in a run's folder, and in the folder of all runs of a name."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from train.errors import CheckpointError

LATEST = "latest"
"""The link to the newest run, beside the runs of its name."""


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
        """Versions, commit, command and its working folder, planned steps, ranks and device."""
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

    @property
    def lock(self) -> Path:
        """Held for as long as the run goes on."""
        return self.path / ".lock"

    @property
    def report(self) -> Path:
        """The page that shows how the run goes."""
        return self.path / "report.html"

    @property
    def certificate(self) -> Path:
        """What `omnitune certify` has found."""
        return self.path / "certificate.json"

    def link_latest(self) -> None:
        """Let `latest` beside it be a relative link to it; does nothing where links cannot be made."""
        aside = self.path.with_name(f".{LATEST}.{self.path.name}")
        with suppress(OSError, NotImplementedError):
            aside.unlink(missing_ok=True)
            aside.symlink_to(self.path.name, target_is_directory=True)
            aside.replace(self.path.with_name(LATEST))
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def model_in(path: Path) -> Path:
    """The model folder that a user names: itself, or the export of a run by the run's folder.

    Raises CheckpointError for a run without an export.
    """
    run = RunFolder(path)
    if (path / "config.json").exists() or not any(
        file.exists() for file in (run.config, run.checkpoints, run.quarantine)
    ):
        return path
    if not (run.export / "config.json").is_file():
        raise CheckpointError(
            f"'{path}' is the folder of a run, which has no export/ yet; the run makes it when it is finished, and "
            f"`omnitune export {path}` makes one from its newest checkpoint"
        )
    return run.export
