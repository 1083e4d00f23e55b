"""What a run says about itself: the observers of steps and evaluations. They watch, and change nothing."""

import json
import logging
import math
import re
import resource
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from train.engine.evaluator import Evaluation
from train.engine.terminal import progress_bar

log = logging.getLogger(__name__)

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, the same numbers on every rank (times are the main process's own)."""

    step: int
    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    step_s: float
    data_wait_s: float
    device_wait_s: float
    rates: dict[str, float]
    not_finite: int = 0
    """steps so far that were left out, because a loss or gradient was not finite"""
    source_losses: dict[str, float] = field(default_factory=dict)
    mfu: float | None = None
    """model FLOPs utilization: the operations that the step needed, a second of it, over the devices' peak; None where
    that is not known"""
    expected_gib: float | None = None
    """memory that the run was expected to need at its peak; None where it was not predicted"""

    def to_dict(self) -> dict[str, float]:
        """The line of metrics.jsonl."""
        return {
            "step": self.step,
            "loss": self.loss,
            **{f"loss/{name}": value for name, value in self.source_losses.items()},
            "grad_norm": self.grad_norm,
            **{f"lr/{name}": value for name, value in self.rates.items()},
            "not_finite": self.not_finite,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "tokens_per_s": self.tokens / self.step_s,
            **({} if self.mfu is None else {"mfu": self.mfu}),
            "time/step_s": self.step_s,
            "time/data_wait_s": self.data_wait_s,
            "time/device_wait_s": self.device_wait_s,
            "memory/peak_gib": peak_memory_gib(),
            **({} if self.expected_gib is None else {"memory/expected_gib": self.expected_gib}),
        }


class Observer(Protocol):
    """Watches a run on the main process."""

    def on_step(self, report: StepReport) -> None: ...

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None: ...

    def close(self, *, failed: bool) -> None:
        """Called once, at the end of the run, whether it is done, stopped or `failed`."""


def peak_memory_gib() -> float:
    """Most memory held so far: on the device with CUDA, else by the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return _peak_resident_kib() / 2**20


def _peak_resident_kib() -> int:
    """Linux's own mark of the process: what getrusage says starts at the memory of the process that launched it."""
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE):
            return int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class MetricsFile:
    """metrics.jsonl: a JSON line a step, and one an evaluation."""

    def __init__(self, file: Path, resume_step: int):
        self._forget_after(file, resume_step)
        self._file = file.open("a", encoding="utf-8")

    @staticmethod
    def _forget_after(file: Path, step: int) -> None:
        """Drop the lines of steps after `step`, which will be run again, and what is no line of ours."""
        if file.exists():
            kept = [line for line in file.read_bytes().split(b"\n") if _step_of(line) <= step]
            aside = file.with_name(f".{file.name}")
            aside.write_bytes(b"".join(line + b"\n" for line in kept))
            aside.replace(file)

    def on_step(self, report: StepReport) -> None:
        """Append the step's line."""
        self._write(report.to_dict())

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Append the evaluation's line."""
        self._write({"step": step, **evaluation.values})

    def _write(self, values: dict[str, float]) -> None:
        # JSON has no NaN and no infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        self._file.close()


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line.decode())["step"])
    except (ValueError, KeyError, TypeError, RecursionError):  # the last line of a killed run may be cut short
        return math.inf


class Progress:
    """A bar with loss, rate and time left; now and then a line where the output is no terminal."""

    def __init__(self, total_steps: int, resume_step: int):
        self._bar = progress_bar("step", total_steps, done=resume_step)

    def on_step(self, report: StepReport) -> None:
        """Move the bar."""
        shown = {"train_loss": f"{report.loss:.3f}", "tokens_per_s": f"{report.tokens / report.step_s:.0f}"}
        if report.mfu is not None:
            shown["mfu"] = f"{100 * report.mfu:.1f}%"
        shown |= {"data_wait_s": f"{report.data_wait_s:.2f}", "device_wait_s": f"{report.device_wait_s:.2f}"}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Print a table of the figures above the bar."""
        log.info("held-out records, after step %d:\n%s", step, evaluation.table())

    def close(self, *, failed: bool) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class Profiler:
    """Writes a torch profile of `steps` steps, after two that warm up, to `file` (for Perfetto)."""

    def __init__(self, file: Path, steps: int):
        schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
        self._profile = torch.profiler.profile(
            schedule=schedule, on_trace_ready=lambda profile: profile.export_chrome_trace(str(file))
        )
        self._profile.start()

    def on_step(self, report: StepReport) -> None:
        """Count the step."""
        self._profile.step()

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Nothing: evaluations are part of the step they fall in."""

    def close(self, *, failed: bool) -> None:
        """End the profile, which writes what there is of it."""
        self._profile.stop()
