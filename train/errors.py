"""The exceptions that are meant for users: each says where, what was found, and what to do."""


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
