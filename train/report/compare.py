"""Runs beside each other: figures with intervals, options that differ, and records on which they disagree."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.config import METRICS, Options
from train.inference.predictions import Prediction
from train.pages.page import figure, render, write_page
from train.report.answers import badness, scores
from train.report.bootstrap import Interval, paired_interval
from train.report.curves import compared_charts
from train.report.media import Bounds
from train.report.options import differing
from train.report.reading import RunFiles, read_run
from train.report.report import answer_media, short

_MOST = 200
"""Most records that are listed, those on which the runs differ most."""

Key = tuple[str, int, str, str]
"""What makes a held-out record the same in two runs: its file's name, line, prompt and reference."""


@dataclass(frozen=True)
class Row:
    """A figure of each run, and each run's difference from the first."""

    name: str
    values: list[float | None]
    intervals: list[Interval | None]
    """None for the first run, and where there are no records by which to tell"""
    more_is_better: bool
    records: int = 0
    """over which it was measured in each run; 0 where that is not known"""

    def verdict(self, run: int) -> str:
        """ "better" or "worse" where the interval leaves no doubt, else ""."""
        interval = self.intervals[run]
        if not interval or interval.low <= 0 <= interval.high:
            return ""
        return "better" if (interval.low > 0) == self.more_is_better else "worse"


@dataclass(frozen=True)
class Disagreement:
    """A held-out record that the runs answered differently well."""

    of: Prediction
    answers: list[str]
    badness: list[float]


@dataclass(frozen=True)
class Comparison:
    """What tells runs apart."""

    names: list[str]
    files: list[RunFiles]
    options: list[Options | None]
    steps: list[int]
    """of each run's newest evaluation with answers; 0 where there is none"""
    records: int
    """held-out records that all runs answered"""
    rows: list[Row]
    disagreements: list[Disagreement]


def compare(paths: Sequence[Path], options: Sequence[Options | None]) -> Comparison:
    """Compare each of the runs with the first, by the answers of its newest evaluation.

    Raises OmniTuneError where a folder is not that of a run.
    """
    files = [read_run(path) for path in paths]
    metrics = list(dict.fromkeys(entry for one in options if one for entry in one.eval.metrics)) or ["exact_match"]
    steps = [max(run.answered(), default=0) for run in files]
    answers = [_by_key(run.predictions(step)) for run, step in zip(files, steps, strict=True)]
    common = [key for key in answers[0] if all(key in others for others in answers[1:])]
    of_runs = [[found[key] for key in common] for found in answers]
    losses = [run.metrics.final().get("eval/loss") for run in files]
    rows = [Row("loss", losses, [None] * len(files), more_is_better=False)]
    return Comparison(
        names_of(paths),
        files,
        list(options),
        steps,
        len(common),
        rows + _rows(of_runs, metrics),
        _disagreements(of_runs, metrics),
    )


def names_of(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names if len(set(names)) == len(names) else [f"{name} ({number})" for number, name in enumerate(names, 1)]


def _by_key(predictions: Sequence[Prediction]) -> dict[Key, Prediction]:
    return {(Path(one.file).name, one.line, one.prompt, one.reference): one for one in predictions}


def _rows(of_runs: list[list[Prediction]], metrics: Sequence[str]) -> list[Row]:
    """Each metric over the records that all runs answered: all of them, and those of each type."""
    types = sorted({prediction.type for prediction in of_runs[0]})
    rows = []
    for name in dict.fromkeys(entry.partition("/")[0] for entry in metrics):
        entries = [entry for entry in metrics if entry.partition("/")[0] == name]
        for kind in [None, *types] if len(types) > 1 else [None]:
            tables = [_table(predictions, entries, name, kind) for predictions in of_runs]
            if not len(tables[0]) or not tables[0][:, 1].sum():
                continue
            values = [float(table[:, 0].sum() / table[:, 1].sum()) for table in tables]
            intervals = [None, *(paired_interval(tables[0], table) for table in tables[1:])]
            rows.append(
                Row(name if kind is None else f"{name}/{kind}", list(values), intervals, METRICS[name], len(tables[0]))
            )
    return rows


def _table(predictions: Sequence[Prediction], entries: Sequence[str], name: str, kind: str | None) -> np.ndarray:
    """Score and weight of each record of a type, or of all: float (n, 2)."""
    found = [scores(one, entries) for one in predictions if kind is None or one.type == kind]
    return np.array([one[name] for one in found if name in one], float).reshape(-1, 2)


def _disagreements(of_runs: list[list[Prediction]], metrics: Sequence[str]) -> list[Disagreement]:
    found = []
    for predictions in zip(*of_runs, strict=True):
        how_bad = [badness(one, metrics) for one in predictions]
        if max(how_bad) > min(how_bad):
            found.append(Disagreement(predictions[0], [one.answer for one in predictions], how_bad))
    return sorted(found, key=lambda one: min(one.badness) - max(one.badness))


def as_text(comparison: Comparison) -> str:
    """A line for each run: the figures over all records, and how far they are from those of the first run."""
    rows = [row for row in comparison.rows if "/" not in row.name]
    cells = [["run", *(row.name for row in rows)]]
    for number, name in enumerate(comparison.names):
        cells.append([name, *(_cell(row, number) for row in rows)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(
        [
            *lines,
            f"in brackets: the difference from {comparison.names[0]}, and its paired bootstrap interval (95 %) over "
            f"{comparison.records} held-out records",
        ]
    )


def _cell(row: Row, run: int) -> str:
    interval = row.intervals[run]
    if not interval:
        return figure(row.values[run])
    said = f"{figure(row.values[run])} ({interval.difference:+.3f}: {interval.low:+.3f} to {interval.high:+.3f})"
    return f"{said} {row.verdict(run)}".rstrip()


def write_comparison(out: Path, comparison: Comparison) -> None:
    """Write the page. Raises OmniTuneError where it cannot be written."""
    listed = comparison.disagreements[:_MOST]
    first = next((number for number, one in enumerate(comparison.options) if one), 0)
    read = [one for one in comparison.options if one]
    page = render(
        Path(__file__).with_name("compare.html.jinja"),
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        comparison=comparison,
        listed=listed,
        charts=compared_charts(
            {name: run.metrics for name, run in zip(comparison.names, comparison.files, strict=True)}
        ),
        differing=differing(read) if len(read) == len(comparison.options) else None,
        media=answer_media(
            comparison.files[first], comparison.options[first], [one.of for one in listed], {}, Bounds()
        ),
        short=short,
    )
    write_page(out, page)
