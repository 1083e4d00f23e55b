"""Everything that a run would trip over, found before it begins."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from train.checks.check import check
from train.checks.chosen import model_folder
from train.config import Options
from train.data.record_set import RecordSet
from train.engine.build_data import length_cache
from train.engine.quarantine import Quarantine
from train.engine.terminal import progress_bar
from train.errors import ConfigError, OmniTuneError
from train.preflight.examine import Examined, Facts, examine
from train.preflight.folder_check import check_model_folder
from train.preflight.machine import look_at_machine
from train.preflight.prepare import Prepared, prepare
from train.wording import counted

_PERCENTILES = (0, 5, 50, 95, 100)
_DUPLICATES = 50
"""Most groups of equal records that are named."""


@dataclass
class Report:
    """What was found. The run would not start, or not end well, with any of the `faults`."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    """records of each file: totals, and by type"""
    bad: list[dict[str, Any]] = field(default_factory=list)
    """file, line and reason of each record that cannot be used"""
    duplicates: list[list[str]] = field(default_factory=list)
    """groups of equal records, each as file:line"""
    leaked: int = 0
    """held-out records that training has too"""
    known: int = 0
    """records that an earlier look had found in order"""

    @property
    def exit_code(self) -> int:
        """0: all is well; 1: training would be refused; 3: it starts, and leaves records out."""
        return 1 if self.faults else 3 if self.bad else 0

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"exit_code": self.exit_code}


def examine_run(options: Options) -> Report:
    """Look at all that a run with these options needs."""
    report = Report()
    report.machine, report.faults, report.notes = look_at_machine(options)
    try:
        check(options, int(os.environ.get("WORLD_SIZE", "1")), os.environ)
    except ConfigError as error:
        report.faults += error.problems
    try:
        prepared = prepare(options)
    except (OmniTuneError, OSError) as error:
        report.faults += [str(error)] if str(error) not in report.faults else []
        return report
    weights = model_folder(options)[0] == "model.path"
    faults, odd = check_model_folder(prepared.family, prepared.folder, weights=weights)
    report.faults += faults
    report.notes += odd
    _look_at_records(prepared, report)
    return report


def _look_at_records(prepared: Prepared, report: Report) -> None:
    options, found = prepared.options, {}
    cache = length_cache(options, prepared.folder, "examined")
    for name, records in prepared.sets.items():
        with progress_bar(f"decoding {name}: record", len(records)) as bar:
            found[name] = examine(records, cache, bar.update)
        report.known += found[name].known
        report.bad += [{"option": name, **asdict(note)} for note in found[name].bad]
        report.sources += _sources(name, records, found[name])
    _find_duplicates(prepared, found, report)
    records_in = {name: len(records) for name, records in prepared.sets.items()}
    quarantine = Quarantine(
        None,
        total_records=sum(records_in.values()),
        max_fraction=options.data.max_bad_fraction,
        held_out=records_in.get("data.eval", 0),
        held_out_files=[source.path for source in options.data.eval],
    )
    try:
        quarantine.add([note for examined in found.values() for note in examined.bad])
        if "data.train" in prepared.sets:
            prepared.plan(found["data.train"].measured(prepared.sets["data.train"]))
    except OmniTuneError as error:
        report.faults.append(str(error).replace("quarantine.jsonl lists them", "they are listed here"))


def _sources(option: str, records: RecordSet, examined: Examined) -> list[dict[str, Any]]:
    """A summary of each source: all of its records, then those of each type."""
    made, start = [], 0
    for spec, end in zip(records.specs, records.ends.tolist(), strict=True):
        usable = [facts for facts in examined.facts[start:end] if facts]
        types = sorted({facts.type for facts in usable})
        made.append(
            {"option": option, "name": spec.name, "path": spec.path, "records": end - start}
            | {"bad": end - start - len(usable), **_summary(usable)}
            | {"types": {kind: _summary([facts for facts in usable if facts.type == kind]) for kind in types}}
        )
        start = end
    return made


def _summary(facts: list[Facts]) -> dict[str, Any]:
    sums = {name: sum(getattr(one, name) for one in facts) for name in ("learned", "text", "image", "audio")}
    tokens = sum(sums.values())
    images = [size for one in facts for size in one.images]
    clips = [clip for one in facts for clip in one.clips]
    return {
        "usable": len(facts),
        "tokens": tokens,
        "shares": {name: round(count / tokens, 4) if tokens else 0.0 for name, count in sums.items()},
        "tokens_percentiles": _percentiles(one.tokens for one in facts),
        "images": len(images),
        "image_sizes": dict(Counter(f"{width}x{height}" for width, height in images).most_common(5)),
        "clips": len(clips),
        "hours": round(sum(seconds for seconds, _ in clips) / 3600, 3),
        "seconds_percentiles": _percentiles(seconds for seconds, _ in clips),
        "rates": dict(Counter(str(rate) for _, rate in clips).most_common(5)),
    }


def _percentiles(values: Iterable[float]) -> dict[str, float]:
    held = list(values)
    if not held:
        return {}
    found = np.percentile(held, _PERCENTILES).round(2).tolist()
    return {f"p{share}": value for share, value in zip(_PERCENTILES, found, strict=True)}


def _find_duplicates(prepared: Prepared, found: dict[str, Examined], report: Report) -> None:
    """Records whose texts and media are equal, in one set or in both."""
    places: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, examined in found.items():
        for index, facts in enumerate(examined.facts):
            if facts:
                places[facts.digest].append((name, index))
    groups = [group for group in places.values() if len(group) > 1]
    for group in groups:
        held_out = sum(name == "data.eval" for name, _ in group)
        report.leaked += held_out if held_out < len(group) else 0
    report.duplicates = [[prepared.sets[name].name_of(index) for name, index in group] for group in groups]
    if groups:
        copies = sum(map(len, groups)) - len(groups)
        report.notes.append(f"copies of other records, text and media alike: {copies}")
    if report.leaked:
        report.notes.append(f"held-out records that are also trained on: {report.leaked}; take them out of either")


def as_text(report: Report) -> str:
    """The report for a terminal."""
    lines = []
    for source in report.sources:
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in source["shares"].items())
        lines.append(f"{source['option']} {source['name']} ({source['path']}): {counted(source['records'], 'record')}")
        lines.append(
            f"  {source['bad']} cannot be used; {source['tokens']:,} tokens: {shares}; at 5 | 50 | 95 % of records:"
        )
        for kind, about in {"all": source, **source["types"]}.items():
            lines.append(f"  {kind or '(no type)':16} {_row(about)}")
        if source["images"]:
            lines.append(f"  image sizes: {_counts(source['image_sizes'])}")
        if source["clips"]:
            lines.append(f"  sampling rates: {_counts(source['rates'])}")
    lines += [f"bad: {note['reason']}" for note in report.bad]
    lines += [f"equal: {', '.join(group)}" for group in report.duplicates[:_DUPLICATES]]
    machine = dict(report.machine)
    installed = {name: found for name, found in machine.pop("versions", {}).items() if found}
    lines.append("versions: " + ", ".join(f"{name} {found}" for name, found in installed.items()))
    lines.append("machine: " + ", ".join(f"{name} {value}" for name, value in machine.items()))
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"FAULT: {fault}" for fault in report.faults]
    verdicts = {0: "all is well", 1: "training would be refused", 3: "training would leave out the bad records"}
    return "\n".join([*lines, verdicts[report.exit_code]])


def _row(about: dict[str, Any]) -> str:
    tokens, seconds = about["tokens_percentiles"], about["seconds_percentiles"]
    said = f"{counted(about['usable'], 'record'):>15}"
    if tokens:
        said += f", tokens {tokens['p5']:.0f} | {tokens['p50']:.0f} | {tokens['p95']:.0f}"
    if about["images"]:
        said += f", {counted(about['images'], 'image')}"
    if seconds:
        said += f", {counted(about['clips'], 'clip')}, {about['hours']:g} h, {seconds['p50']:g} s median"
    return said


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())
