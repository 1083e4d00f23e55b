"""A page of a few records as the model will see them, the packs of the first step, and what cannot be used."""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from train.data.record_set import BadNote, Measured, RecordSet, Watching
from train.data.workers import Results
from train.pages.page import render
from train.preflight.prepare import Prepared
from train.preflight.shown import ShownRecord, Tally, show, tally_of
from train.schema import Record

_PACKS = 32
"""Most packs of the first step that are drawn."""

_BAD = 100
"""Most records of a source whose reasons are listed."""

Item = tuple[int, bool]
"""A record's index, and whether it is shown whole, its media decoded, or only counted."""


@dataclass(frozen=True)
class Source:
    """A file of records, as the page has it."""

    option: str
    name: str
    path: str
    weight: float
    records: int
    types: list[tuple[str, int]]
    """of the usable records, with their numbers"""
    bad: list[BadNote]
    groups: list[tuple[str, list[ShownRecord]]] = field(default_factory=list)
    """a few records of each type"""


@dataclass(frozen=True)
class Pack:
    """The records of a pack: where each begins, as a file and a line, and how its tokens are shared out."""

    records: list[tuple[str, Tally]]
    tokens: int
    total: Tally


def preview(prepared: Prepared, *, each: int, command: str) -> str:
    """The page, as HTML that needs nothing beside itself.

    each: records that are shown of each type in each source.
    command: what made the page, for its head.
    """
    plan = prepared.plan()
    step = next(iter(plan.steps()))[2]
    sources: list[Source] = []
    packs: list[Pack] = []
    for option, records in prepared.sets.items():
        measured, bad = prepared.measured[option]
        chosen = _choose(measured, each)
        drawn = step[:_PACKS] if option == "data.train" else []
        shown, counted, failed = _read(records, [row for row, _, _ in chosen], [row for pack in drawn for row in pack])
        sources += _sources(option, records, measured, [*bad, *failed], chosen, shown)
        packs += [_pack(pack, records, counted) for pack in drawn]
    return render(
        Path(__file__).with_name("preview.html.jinja"),
        command=command,
        model=prepared.folder,
        sources=sources,
        packs=packs,
        packs_in_step=len(step),
        max_tokens=plan.limits.tokens,
        most_bad=_BAD,
    )


def _choose(measured: Measured, each: int) -> list[tuple[int, int, str]]:
    """(index, source, type) of the records that are shown: of each type in each source `each`, evenly spread."""
    chosen = []
    for source, usable in enumerate(measured.by_source()):
        rows_of: dict[str, list[int]] = {}
        for row in usable.tolist():
            rows_of.setdefault(measured.types[row], []).append(row)
        for kind, rows in rows_of.items():
            for place in np.linspace(0, len(rows) - 1, min(each, len(rows))).round().astype(int).tolist():
                chosen.append((rows[place], source, kind))
    return chosen


def _read(
    records: RecordSet, shown: list[int], counted: list[int]
) -> tuple[dict[int, ShownRecord], dict[int, Tally], list[BadNote]]:
    """Records to show and to count, by index, and notes on those that cannot be decoded."""
    items: list[Item] = [(index, True) for index in shown] + [(index, False) for index in dict.fromkeys(counted)]
    whole: dict[int, ShownRecord] = {}
    tallies: dict[int, Tally] = {}
    bad: dict[int, BadNote] = {}
    results = Results(partial(_look_at, records), lambda done: items[done:], records.given_up, records.workers)
    for (index, _), found in zip(items, results, strict=True):
        if isinstance(found, BadNote):
            bad[index] = found
        elif isinstance(found, ShownRecord):
            whole[index] = found
        else:
            tallies[index] = found
    return whole, tallies, list(bad.values())


def _look_at(records: RecordSet, item: Item, watch: Watching) -> ShownRecord | Tally | BadNote:
    index, is_shown = item

    def read(record: Record) -> ShownRecord | Tally:
        if is_shown:
            return show(records, record, records.name_of(index))
        return tally_of(records.outline_of(record))

    return records.attempt(index, read, watch)


def _sources(
    option: str,
    records: RecordSet,
    measured: Measured,
    bad: list[BadNote],
    chosen: list[tuple[int, int, str]],
    shown: dict[int, ShownRecord],
) -> list[Source]:
    made = []
    starts = [0, *records.ends[:-1].tolist()]
    for number, (spec, usable) in enumerate(zip(records.specs, measured.by_source(), strict=True)):
        groups: dict[str, list[ShownRecord]] = {}
        for index, source, kind in chosen:
            if source == number and index in shown:
                groups.setdefault(kind, []).append(shown[index])
        types = Counter(measured.types[row] for row in usable.tolist())
        made.append(
            Source(
                option=option,
                name=spec.name,
                path=spec.path,
                weight=spec.weight,
                records=int(records.ends[number]) - starts[number],
                types=sorted(types.items()),
                bad=[note for note in bad if note.source == spec.path],
                groups=list(groups.items()),
            )
        )
    return made


def _pack(pack: list[int], records: RecordSet, counted: dict[int, Tally]) -> Pack:
    held = [(records.name_of(index), counted[index]) for index in pack if index in counted]
    sums = (sum(getattr(tally, name) for _, tally in held) for name in ("learned", "text", "image", "audio"))
    total = Tally(*sums)
    return Pack(held, total.tokens, total)
