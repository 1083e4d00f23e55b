"""A sweep (`-m`): each of its runs is launched by itself, in a folder named after what tells it apart; then all are
compared. A run that fails ends alone."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from types import FrameType

from hydra.core.override_parser.overrides_parser import OverridesParser

from train.errors import ConfigError
from train.launcher.failure import STOPPED

LAUNCHER = "OMNITUNE_LAUNCHER"
"""The variable in which launch.sh says what starts a run on several processes or machines."""

_QUOTES = "'\""

_LONGEST = 120
"""Characters of a folder's name."""


class Sweep:
    """The runs of a sweep, one after the other."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        """That of the first run's run.dir: all of them stand in it."""
        self.runs: list[Path] = []
        self.failed: list[Path] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    def run(self, script: str, task: Sequence[str], folder: str) -> None:
        """Launch one run with these overrides, and wait for its end.

        folder: its run.dir, as the options say it. Raises ConfigError within a launched process; exits where the sweep
        was asked to stop.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                [
                    "-m: a sweep launches each of its runs itself, but it was launched on several processes; write "
                    "`NUM_PROCESSES=... ./launch.sh -m ...`"
                ]
            )
        self.folder = self.folder or Path(folder)
        run = self._place(task)
        words = [word for word in task if not word.startswith("run.dir=")]
        print(f"run {len(self.runs) + 1} of the sweep: {run}", file=sys.stderr, flush=True)
        self.runs.append(run)
        launcher = shlex.split(os.environ.get(LAUNCHER) or sys.executable)
        quoted = str(run).replace("'", r"\'")
        code = self._launch([*launcher, script, *words, f"run.dir='{quoted}'"])
        if code:
            self.failed.append(run)
        if self._is_stopped:
            sys.exit(STOPPED)

    def close(self) -> None:
        """Compare the runs that succeeded, and name the others; exits with 1 if there are any."""
        if not self.runs:
            return
        succeeded = [run for run in self.runs if run not in self.failed]
        if len(succeeded) > 1 and os.environ.get("MACHINE_RANK", "0") == "0":
            from train.commands.compare import compare_runs

            assert self.folder
            compare_runs(succeeded, self.folder / "compare.html")
        if self.failed:
            sys.exit(f"error: {len(self.failed)} of {len(self.runs)} runs failed: {', '.join(map(str, self.failed))}")

    def _place(self, task: Iterable[str]) -> Path:
        assert self.folder
        name = name_of(task, swept_by(sys.argv[1:]))
        run = self.folder / name
        return self.folder / f"{name}-{len(self.runs)}" if run in self.runs else run

    def _launch(self, command: Sequence[str]) -> int:
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._process = subprocess.Popen(command)
            return self._process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._is_stopped = True
        if self._process:
            self._process.send_signal(number)


def swept_by(words: Iterable[str]) -> set[str]:
    """The options to which a command line gives several values.

    >>> swept_by(["-m", "lora=lora", "lora.rank=8,16"])
    {'lora.rank'}
    """
    parser = OverridesParser.create()
    overrides = [parser.parse_override(word) for word in words if "=" in word and not word.startswith("-")]
    return {override.key_or_group for override in overrides if override.is_sweep_override()}


def name_of(task: Iterable[str], swept: Collection[str]) -> str:
    """What tells a run apart, as a folder's name that needs no quotes on a command line.

    >>> name_of(["+recipe=lora", "lora.rank=8", "run.seed=1"], {"lora.rank", "run.seed"})
    'lora.rank-8_run.seed-1'
    """
    words = [word.lstrip("+").partition("=") for word in task]
    named = [f"{key}-{value.strip(_QUOTES)}" for key, _, value in words if key in swept]
    return re.sub(r"[^\w.+-]+", "-", "_".join(named))[:_LONGEST].strip("-") or "run"
