"""What stands in a run's folder, read as it is: a killed run's last line may be cut, a running one's files grow."""

import json
import re
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from train.data.record_set import BadNote
from train.errors import OmniTuneError
from train.inference.predictions import Prediction
from train.run_folder import RunFolder

T = TypeVar("T")

_STEP_FILE = re.compile(r"step-(\d+)\.jsonl")


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl: a row for each optimizer step, and the figures of each evaluation."""

    steps: np.ndarray
    """float64 (n,)"""
    columns: dict[str, np.ndarray]
    """float64 (n,) each; NaN where a step has none, or one that is not finite"""
    evaluations: dict[int, dict[str, float]]
    """by step, ascending"""

    @property
    def last_step(self) -> int:
        """The newest step of a row or an evaluation; 0 where there is none."""
        return max([int(self.steps[-1]) if len(self.steps) else 0, *self.evaluations])

    def final(self) -> dict[str, float]:
        """The figures of the newest evaluation; empty where there is none."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else {}


@dataclass(frozen=True)
class RunFiles:
    """What a run has left in its folder so far."""

    folder: RunFolder
    metrics: Metrics
    quarantine: list[BadNote]
    environment: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    """export/export.json"""
    certificate: list[dict[str, Any]] = field(default_factory=list)
    """the lines of certificate.json"""

    def predictions(self, step: int) -> list[Prediction]:
        """The answers of the evaluation after that step; empty where it made none."""
        return read_lines(self.folder.predictions / f"step-{step:06d}.jsonl", Prediction)

    def answered(self) -> list[int]:
        """The evaluations with answers, ascending; a file that a killed run left beyond its checkpoint is none."""
        found = [_STEP_FILE.fullmatch(file.name) for file in self.folder.predictions.glob("step-*.jsonl")]
        return sorted({int(match[1]) for match in found if match} & self.metrics.evaluations.keys())

    @property
    def total_steps(self) -> int | None:
        """The steps that the run plans."""
        total = self.environment.get("total_steps")
        return total if isinstance(total, int) else None

    def resolved(self, path: str) -> Path:
        """A path of the run's options, as seen from the folder in which the run was started."""
        return Path(str(self.environment.get("working_folder", ""))) / Path(path).expanduser()


def read_run(path: Path) -> RunFiles:
    """The files of a run. Raises OmniTuneError where the folder is not that of a run."""
    folder = RunFolder(path)
    if not folder.config.is_file():
        what = "is not there" if not path.exists() else "has no config.yaml, so it is not the folder of a run"
        raise OmniTuneError(f"'{path}' {what}; name a folder such as outputs/full/latest")
    certificate = _object(folder.certificate).get("lines")
    return RunFiles(
        folder,
        read_metrics(folder.metrics),
        read_lines(folder.quarantine, BadNote),
        _object(folder.environment),
        _object(folder.export / "export.json"),
        [line for line in certificate if isinstance(line, dict)] if isinstance(certificate, list) else [],
    )


def read_metrics(file: Path) -> Metrics:
    """The steps and evaluations of metrics.jsonl; what is no whole line is passed over."""
    steps = array("d")
    columns: dict[str, array] = {}
    evaluations: dict[int, dict[str, float]] = {}
    for line in _objects(file):
        step = line.pop("step", None)
        if not isinstance(step, int):
            continue
        values = {name: value for name, value in line.items() if isinstance(value, int | float)}
        if any(name.startswith("eval/") for name in line):
            evaluations[step] = values
        elif "loss" in line:
            for name, value in values.items():
                columns.setdefault(name, array("d", [nan]) * len(steps)).append(value)
            steps.append(step)
            for column in columns.values():
                if len(column) < len(steps):
                    column.append(nan)
    arrays = {name: np.array(column) for name, column in columns.items()}
    return Metrics(np.array(steps), arrays, dict(sorted(evaluations.items())))


def read_lines(file: Path, kind: Callable[..., T]) -> list[T]:
    """The lines of a file as objects of a class whose fields they hold; others are passed over."""
    found = []
    for line in _objects(file):
        with suppress(TypeError):
            found.append(kind(**line))
    return found


def _objects(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for line in lines:
            with suppress(ValueError, RecursionError):
                value = json.loads(line.decode())
                if isinstance(value, dict):
                    yield value


def _object(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(file.read_bytes().decode())
        return value if isinstance(value, dict) else {}
    return {}
