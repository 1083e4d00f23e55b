"""The exceptions that are meant for users: each says where, what was found, and what to do."""

from errno import EDQUOT, ENOSPC


class OmniTuneError(ValueError):
    """Something the user can put right; shown as its message alone, without a traceback."""


class ConfigError(OmniTuneError):
    """Options that do not fit together; all faults are reported at once."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        listed = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{len(problems)} problem(s) in the options:\n{listed}")


class BadRecord(OmniTuneError):
    """A record that cannot be used; it is written to quarantine.jsonl with this reason, and the run goes on."""


class TooMuchBadData(OmniTuneError):
    """More records were quarantined than `data.max_bad_fraction` allows."""


class CheckpointError(OmniTuneError):
    """A model folder or a checkpoint that cannot be read, or does not fit the model."""


class TrainingError(OmniTuneError):
    """Training that cannot go on, though options, data and checkpoints are in order."""


def message_for_user(error: Exception) -> str | None:
    """What to say of an error that the user can put right; None for any other."""
    if isinstance(error, OmniTuneError):
        return str(error)
    # safetensors' own exception has the system's error in its text alone.
    if getattr(error, "errno", None) in (ENOSPC, EDQUOT) or f"(os error {ENOSPC})" in str(error):
        return (
            f"a disk is full ({error}); make room: the same command with run.dir=<the run's folder> goes on from its "
            "newest checkpoint"
        )
    return None
