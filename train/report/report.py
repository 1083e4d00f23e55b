"""The page of a run: how it goes, what it answers, and what it was."""

import html
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train.config import Options
from train.data.record_set import SourceSpec
from train.data.workers import Workers
from train.pages.page import render, write_page
from train.report.answers import Answer, confusions, judge, reasons
from train.report.curves import evaluation_charts, training_charts
from train.report.media import Bounds, Place, Shown, read_media
from train.report.options import different
from train.report.reading import Metrics, RunFiles, read_run
from train.report.verdict import State, checks, state_of, tiles
from train.sources import source_specs

MOST_ANSWERS = 2000
"""Most answers that are listed."""

_MOST_TEXT = 400
"""Most characters of a prompt, reference or answer."""

_MOST_BYTES = 5_000_000
"""Most bytes of the answers' texts together."""

_MOST_REASONS, _MOST_PLACES = 40, 8
"""Reasons for quarantine that are listed, and records of each."""

_COLUMNS = 8
"""Evaluations in the table of figures, evenly spread, the first and the last among them."""

_DECODE_LIMIT_S = 5.0
"""Seconds that the media of one record may take: those that evaluation could read take less."""


@dataclass(frozen=True)
class Written:
    """What was written: for the next page, the media that are on this one."""

    media: Mapping[Place, list[Shown]]


def write_report(
    path: Path,
    options: Options | None,
    *,
    out: Path | None = None,
    state: State | None = None,
    bounds: Bounds = Bounds(),  # noqa: B008  (frozen)
    known: Mapping[Place, list[Shown]] | None = None,
) -> Written:
    """Write the page of a run, from what stands in its folder.

    options: None where they cannot be read; then the page shows no media and no options.
    out: the page's file; None = report.html in the run's folder.
    state: None = what a look at the folder tells.
    known: media that an earlier call gave back.

    Raises OmniTuneError where the folder is not that of a run, or the page cannot be written.
    """
    files = read_run(path)
    state = state or state_of(files)
    metrics = options.eval.metrics if options else []
    answered = files.answered()
    before = files.predictions(answered[-2]) if len(answered) > 1 else []
    answers = judge(files.predictions(answered[-1]), before, metrics) if answered else []
    listed = within_bytes(answers)
    media = answer_media(files, options, [answer.of for answer in listed], known or {}, bounds)
    page = render(
        Path(__file__).with_name("report.html.jinja"),
        name=options.run.name if options else path.name,
        folder=str(path),
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        state=state,
        tiles=tiles(files),
        checks=checks(files, state),
        charts=training_charts(files.metrics),
        evaluations=evaluation_charts(files.metrics),
        table=_table(files.metrics),
        answers=listed,
        all_answers=len(answers),
        answered=answered,
        types=list(dict.fromkeys(sorted(answer.of.type for answer in listed))),
        media=media,
        confusions=confusions(answers),
        quarantined=len(files.quarantine),
        reasons=[(why, count, places[:_MOST_PLACES]) for why, count, places in reasons(files.quarantine)][
            :_MOST_REASONS
        ],
        different=different(options) if options else None,
        environment=_flat(files.environment),
        export=_flat(files.export),
        certificate=files.certificate,
        short=short,
    )
    write_page(out or files.folder.report, page)
    return Written(media)


def short(text: str) -> str:
    """A text that is not too long for a page."""
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}… ({len(text)} characters)"


def within_bytes(answers: Sequence[Answer]) -> list[Answer]:
    """The first of the answers, as many as a page can hold."""
    left, kept = _MOST_BYTES, []
    for answer in answers[:MOST_ANSWERS]:
        texts = answer.of.prompt, answer.of.reference, answer.of.answer, answer.before or "", answer.of.file
        left -= 300 + sum(len(html.escape(short(text)).encode(errors="replace")) for text in texts)
        if left < 0:
            break
        kept.append(answer)
    return kept


def answer_media(
    files: RunFiles,
    options: Options | None,
    shown: Sequence[Any],
    known: Mapping[Place, list[Shown]],
    bounds: Bounds,
) -> dict[Place, list[Shown]]:
    """The media of the records behind predictions, by file and line."""
    if not options:
        return {}
    specs = {spec.path: _from_there(files, spec) for spec in source_specs(options.data.eval)}
    places = [(one.file, one.line) for one in shown if "<image>" in one.prompt or "<audio>" in one.prompt]
    limit = min(_DECODE_LIMIT_S, options.data.decode_limit_s)
    workers = Workers(min(options.data.workers, bounds.processes), options.data.prefetch, limit)
    return read_media(specs, places, known, bounds, workers)


def _from_there(files: RunFiles, spec: SourceSpec) -> SourceSpec:
    """A source whose paths lead to the same files from here as from the folder in which the run was started."""
    return replace(spec, path=str(files.resolved(spec.path)), root=str(files.resolved(spec.root)))


def _table(metrics: Metrics) -> tuple[list[int], list[tuple[str, list[float | None]]]]:
    """Steps, and each figure of the evaluations after them."""
    steps = list(metrics.evaluations)
    if len(steps) > _COLUMNS:
        steps = [steps[round(place * (len(steps) - 1) / (_COLUMNS - 1))] for place in range(_COLUMNS)]
    names = sorted({name for step in steps for name in metrics.evaluations[step] if name.startswith("eval/")})
    return steps, [
        (name.removeprefix("eval/"), [metrics.evaluations[step].get(name) for step in steps]) for name in names
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """JSON values as rows; what is nested gets longer names."""
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name} ")
        else:
            rows.append((f"{prefix}{name}", " ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows
