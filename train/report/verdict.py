"""Whether a run went well, in a few lines: its state, its figures, and what deserves a look."""

import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from train.config import METRICS
from train.pages.page import figure
from train.report.curves import measured
from train.report.reading import RunFiles

_RISEN = 1.02
"""The last held-out loss over the lowest, from which on it counts as risen."""

_WAITING = 0.1
"""Share of the time waiting for data that deserves a look."""

_WINDOW = 0.1
"""Share of the steps whose loss is averaged, at the beginning and at the end."""


class State(StrEnum):
    running = "running"
    failed = "failed"
    finished = "finished"
    unfinished = "unfinished"


class Level(StrEnum):
    good = "good"
    note = "note"
    bad = "bad"


@dataclass(frozen=True)
class Check:
    """Something that is well, or deserves a look, or went wrong."""

    level: Level
    text: str


@dataclass(frozen=True)
class Tile:
    """A figure at the head of the page: its name, its last value, and what it was before."""

    name: str
    value: str
    before: str


def state_of(files: RunFiles) -> State:
    """What a look at the folder tells: a run that goes on keeps its lock."""
    if _is_locked(files):
        return State.running
    total, last = files.total_steps, files.metrics.last_step
    is_exported = bool(last) and files.export.get("step") == last
    return State.finished if is_exported or (total is not None and last >= total) else State.unfinished


def _is_locked(files: RunFiles) -> bool:
    try:
        with files.folder.lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def tiles(files: RunFiles) -> list[Tile]:
    """The figures that say most: steps, losses, metrics of the answers, time."""
    metrics = files.metrics
    total = files.total_steps
    made = [Tile("steps", f"{metrics.last_step:,}", f"of {total:,}" if total else "")]
    losses = _ends(metrics.columns.get("loss"))
    if losses:
        made.append(Tile("training loss", figure(losses[1]), f"at first {figure(losses[0])}"))
    for name in ("eval/loss", *(f"eval/{metric}" for metric in measured(metrics) if metric in METRICS)):
        values = [found[name] for found in metrics.evaluations.values() if name in found]
        if values:
            title = "held-out loss" if name == "eval/loss" else name.removeprefix("eval/").replace("_", " ")
            before = f"at first {figure(values[0])}" if len(values) > 1 else ""
            made.append(Tile(title, figure(values[-1]), before))
    seconds = metrics.columns.get("time/step_s")
    if seconds is not None:
        tokens = float(np.nansum(metrics.columns.get("tokens", np.zeros(1))))
        made.append(Tile("time of the steps", _time(float(np.nansum(seconds))), f"{tokens:,.0f} tokens"))
    return made


def checks(files: RunFiles, state: State) -> list[Check]:
    """What is well and what is not, the worst first."""
    found = [
        *_of_state(files, state),
        *_of_training(files),
        *_of_evaluation(files),
        *_of_records(files),
        *_of_export(files, state),
        *_of_certificate(files),
    ]
    order = list(Level)[::-1]
    return sorted(found, key=lambda check: order.index(check.level))


def _of_state(files: RunFiles, state: State) -> Iterator[Check]:
    step = f"step {files.metrics.last_step:,}" + (f" of {files.total_steps:,}" if files.total_steps else "")
    resume = f"to resume, run the same command with run.dir={files.folder.path}"
    if state is State.finished:
        yield Check(Level.good, "All steps are done.")
    elif state is State.running:
        yield Check(Level.note, f"The run was going on when this page was written, after {step}.")
    elif state is State.failed:
        yield Check(Level.bad, f"An error ended the run after {step}; {resume}.")
    else:
        yield Check(Level.bad, f"The run was killed or stopped after {step}; {resume}.")


def _of_training(files: RunFiles) -> Iterator[Check]:
    columns = files.metrics.columns
    left_out = columns.get("not_finite")
    if left_out is not None and np.nanmax(left_out) > 0:
        count = int(np.nanmax(left_out))
        yield Check(Level.bad, f"{count} step(s) were left out: a loss or gradient was not finite.")
    losses = _ends(columns.get("loss"))
    if losses and losses[1] < losses[0]:
        yield Check(Level.good, f"The training loss fell from {figure(losses[0])} to {figure(losses[1])}.")
    elif losses and len(columns["loss"]) > 1:
        yield Check(Level.bad, f"The training loss did not fall: {figure(losses[0])}, then {figure(losses[1])}.")
    wait, step = columns.get("time/data_wait_s"), columns.get("time/step_s")
    if wait is not None and step is not None:
        share = float(np.nansum(wait) / max(np.nansum(step), 1e-9))
        if share > _WAITING:
            yield Check(Level.note, f"{100 * share:.0f} % of the time went to waiting for data: raise data.workers.")


def _of_evaluation(files: RunFiles) -> Iterator[Check]:
    evaluations = files.metrics.evaluations
    losses = {step: values["eval/loss"] for step, values in evaluations.items() if "eval/loss" in values}
    if not evaluations:
        yield Check(Level.note, "There is no evaluation yet; without data.eval there is none.")
    if len(losses) > 1:
        best = min(losses, key=lambda step: losses[step])
        last = max(losses)
        said = f"{figure(losses[best])} after step {best:,}"
        if losses[last] > _RISEN * losses[best]:
            yield Check(
                Level.note,
                f"The held-out loss was lowest ({said}) and rose to {figure(losses[last])}: "
                "checkpoint.keep_best=eval/loss keeps the best checkpoint.",
            )
        else:
            yield Check(Level.good, f"The held-out loss ended at its lowest, or near ({said}).")
    cut = files.metrics.final().get("eval/cut_answers", 0.0)
    if cut:
        yield Check(Level.note, f"{100 * cut:.1f} % of the answers were cut short: raise eval.max_new_tokens.")


def _of_records(files: RunFiles) -> Iterator[Check]:
    count = len(files.quarantine)
    if count:
        yield Check(Level.note, f"{count} record(s) could not be used; the reasons are below.")
    else:
        yield Check(Level.good, "Every record could be used.")


def _of_export(files: RunFiles, state: State) -> Iterator[Check]:
    if not files.export:
        if state is State.finished:
            yield Check(Level.note, "There is no export yet.")
    elif files.export.get("ok"):
        yield Check(Level.good, f"The export of step {files.export.get('step')} is what was trained: its check passed.")
    else:
        yield Check(Level.bad, "The check of the export failed; see below.")


def _of_certificate(files: RunFiles) -> Iterator[Check]:
    failed = [str(line.get("name")) for line in files.certificate if line.get("passed") is False]
    if failed:
        yield Check(Level.bad, f"The certificate failed: {', '.join(failed)}.")
    elif files.certificate:
        yield Check(Level.good, "The certificate holds: no line of it failed.")


def _ends(values: np.ndarray | None) -> tuple[float, float] | None:
    """Means of the first and of the last tenth of the values."""
    held = values[np.isfinite(values)] if values is not None else np.zeros(0)
    if not len(held):
        return None
    window = max(1, int(len(held) * _WINDOW))
    return float(held[:window].mean()), float(held[-window:].mean())


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
