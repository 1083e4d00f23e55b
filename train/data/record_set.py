"""The records of several sources under one index: checked, measured, decoded."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from train.data.collate import collate
from train.data.lengths import PART, LengthCache, Part, SourceCache, Stamps, stamps_of
from train.data.plan import Limits
from train.data.readers import open_source
from train.data.records import parse_record
from train.data.workers import UNWATCHED, Results, Workers
from train.errors import BadRecord, OmniTuneError
from train.schema import KINDS, Batch, Changes, Kind, Lengths, Outline, Processor, Record, Sample, TooLong

log = logging.getLogger(__name__)

R = TypeVar("R")
Watching = Callable[[int], AbstractContextManager]
"""Entered with a record's index around the work on it."""

_LOOKED_AT = 64
"""Most records among which `few` chooses."""

_LOOKED_UP_HERE = 2**17
"""Most records whose lengths are looked up in this process where all are known: a second, less than workers take to
start."""

_FAULT = 300
"""Most characters of what a decoder says about its failure."""

_FEW = Limits(1024, {"image": 4096, "audio": 3000})
"""What the records that `few` chooses hold together at most, where that leaves out no medium."""


@dataclass(frozen=True)
class SourceSpec:
    """A file of records, the folder of its media, and how often an epoch takes each record."""

    name: str
    path: str
    root: str
    weight: float = 1.0
    format: str = "auto"


@dataclass(frozen=True, slots=True)
class BadNote:
    """A line of quarantine.jsonl."""

    source: str
    line: int
    reason: str


@dataclass
class Measured:
    """A row of `Lengths` for each record (0 tokens: not usable), types, source ends."""

    lengths: np.ndarray
    types: list[str]
    ends: np.ndarray

    def by_source(self) -> list[np.ndarray]:
        """Indices of each source's usable records."""
        starts = np.concatenate([[0], self.ends[:-1]])
        usable = self.lengths[:, 0] > 0
        return [np.flatnonzero(usable[start:end]) + start for start, end in zip(starts, self.ends, strict=True)]


class RecordSet:
    """The records of several sources under one index.

    processor: has `measure`, `encode`, `prompt` and `reference` of a record.
    workers: the processes in which media are opened, wherever many records are read.
    speed: at which the clips run that are measured.
    """

    def __init__(
        self,
        specs: Sequence[SourceSpec],
        processor: Processor,
        *,
        max_tokens: int,
        too_long: TooLong,
        workers: Workers = UNWATCHED,
        speed: float = 1.0,
    ):
        self.speed = speed
        self.specs = list(specs)
        self.processor = processor
        self.workers = workers
        self._fit: dict[str, Any] = {"max_tokens": max_tokens, "too_long": too_long}
        self._sources = [open_source(spec.path, spec.format) for spec in specs]
        self.ends = np.cumsum([len(source) for source in self._sources])
        """Where each source's records end."""
        self.given_up: dict[int, str] = {}
        """Records that are left out, and why: reading them hung or crashed a worker, or `leave_out` named them."""

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """(source, row in the source) of a record."""
        source = int(np.searchsorted(self.ends, index, side="right"))
        return source, index - (int(self.ends[source - 1]) if source else 0)

    def record(self, index: int) -> Record:
        """The checked record; raises BadRecord."""
        source, row = self.locate(index)
        spec, opened = self.specs[source], self._sources[source]
        with self.guarded(index):
            return parse_record(opened[row], root=Path(spec.root), file=spec.path, line=opened.line(row))

    @contextmanager
    def guarded(self, index: int) -> Iterator[None]:
        """Entered around all work on a record: whatever that raises becomes a BadRecord, and costs it alone.

        An OmniTuneError of another kind is not the record's fault, and stays what it is.
        """
        try:
            yield
        except OmniTuneError:
            raise
        except Exception as error:  # such as MemoryError or OverflowError
            reason = f"{type(error).__name__} {error}".strip()[:_FAULT]
            raise BadRecord(f"{self.name_of(index)}: it cannot be used ({reason}); correct or remove it") from error

    def note(self, index: int, error: BadRecord) -> BadNote:
        """The quarantine line of a record that cannot be used."""
        source, row = self.locate(index)
        return BadNote(self.specs[source].path, self._sources[source].line(row), str(error))

    def name_of(self, index: int) -> str:
        """A record's file and line, for messages."""
        source, row = self.locate(index)
        return f"{self.specs[source].path}:{self._sources[source].line(row)}"

    def leave_out(self, notes: Iterable[BadNote]) -> None:
        """Give up the records that were noted before, so that a resumed run trains on the same ones."""
        for note in notes:
            for index in self._indices(note.source, note.line):
                self.given_up[index] = note.reason

    def find(self, path: str, line: int) -> Record | None:
        """The record in a line of a source's file; None where there is none."""
        found = (self.attempt(index, lambda record: record) for index in self._indices(path, line))
        return next((record for record in found if isinstance(record, Record)), None)

    def _indices(self, path: str, line: int) -> Iterator[int]:
        starts = np.concatenate([[0], self.ends[:-1]]).tolist()
        for spec, source, start in zip(self.specs, self._sources, starts, strict=True):
            row = source.index_of(line) if spec.path == path else None
            if row is not None:
                yield start + row

    def attempt(self, index: int, read: Callable[[Record], R], watch: Watching = nullcontext) -> R | BadNote:
        """What `read` makes of a record, or why the record cannot be used: whatever it raises costs that record."""
        try:
            if index in self.given_up:
                raise BadRecord(self.given_up[index])
            with watch(index), self.guarded(index):
                return read(self.record(index))
        except BadRecord as error:
            return self.note(index, error)

    def measure(
        self, cache: LengthCache | None = None, on_records: Callable[[int], None] = lambda count: None
    ) -> tuple[Measured, list[BadNote]]:
        """Lengths of every usable record, by headers alone, and notes on the others; with workers, on all cores.

        What the cache knows is not measured again, unless it could not be used then or its media have changed.
        on_records: called with the number of records that are done since it was called before.
        """
        caches = [cache.of(spec.path, spec.root) if cache else None for spec in self.specs]
        parts = [
            (source, number, begin, min(begin + PART, end))
            for source, end in enumerate(self.ends.tolist())
            for number, begin in enumerate(range(end - len(self._sources[source]), end, PART))
        ]
        cores = len(os.sched_getaffinity(0))
        watched = self.workers.count and not (len(self) <= _LOOKED_UP_HERE and _are_known(caches, parts))
        workers = replace(self.workers, count=min(cores, len(parts)) if watched else 0)
        lengths = np.zeros((len(self), 1 + len(KINDS)), dtype=np.int32)
        types: list[str] = []
        bad: list[BadNote] = []
        unsaved = None
        job = partial(_measure_part, self, caches)
        for part, notes, fault in Results(job, lambda done: parts[done:], self.given_up, workers):
            lengths[len(types) : len(types) + len(part.types)] = part.lengths
            types += map(sys.intern, part.types)  # one string for all of a kind
            bad += notes
            if fault and not unsaved:
                unsaved = fault
                log.warning("lengths cannot be kept (%s), so the next start measures again; set data.cache", fault)
            on_records(len(part.types))
        return Measured(lengths, types, self.ends), bad

    def few(self) -> Batch:
        """A small pack with every medium: the shortest of up to 64 records spread over all, one for each mix of media.

        A mix whose media are there already is left out where the pack would get too large with it.
        Raises OmniTuneError if none of the records can be used.
        """
        workers = replace(self.workers, count=min(self.workers.count, 1))
        [(batch, bad)] = Results(partial(_few, self), lambda done: [None][done:], self.given_up, workers)
        if not batch.records:
            why = f"; the first: {bad[0].reason}" if bad else ""
            raise OmniTuneError(f"none of the records in '{self.specs[0].path}' that were looked at can be used{why}")
        return batch

    def measure_one(self, record: Record) -> Lengths:
        """A record's lengths; raises BadRecord."""
        at: dict[str, Any] = {} if self.speed == 1 else {"speed": self.speed}
        return self.processor.measure(record, **self._fit, **at)

    def outline_of(self, record: Record, *, decode_media: bool = False) -> Outline:
        """A record laid out as tokens, from headers alone or with its media decoded; raises BadRecord."""
        return self.processor.outline(record, **self._fit, decode_media=decode_media)

    def encode(self, record: Record, changes: Changes | None = None) -> Sample:
        """A record as the model takes it, its media decoded, and changed; raises BadRecord."""
        changed: dict[str, Any] = {"changes": changes} if changes else {}
        return self.processor.encode(record, **self._fit, **changed)

    def batch(
        self,
        pack: Sequence[int],
        watch: Watching = nullcontext,
        changes: Callable[[int], Changes | None] = lambda record: None,
    ) -> tuple[Batch, list[BadNote]]:
        """A pack's records decoded and laid end to end; those that fail leave their place empty.

        changes: of the media of a record, by its index.
        """
        samples, sources, records, bad = [], [], [], []
        for index in pack:
            sample = self.attempt(index, partial(self.encode, changes=changes(index)), watch)
            if isinstance(sample, BadNote):
                bad.append(sample)
                continue
            samples.append(sample)
            sources.append(self.locate(index)[0])
            records.append(index)
        return collate(samples, sources, records), bad


def _are_known(caches: Sequence[SourceCache | None], parts: Iterable[tuple[int, int, int, int]]) -> bool:
    """Whether the caches hold all lengths."""
    for source, number, begin, end in parts:
        cache = caches[source]
        part = cache.load(number) if cache else None
        if part is None or len(part.types) != end - begin or part.todo():
            return False
    return True


def _measure_part(
    records: RecordSet, caches: Sequence[SourceCache | None], item: tuple[int, int, int, int], watch: Watching
) -> tuple[Part, list[BadNote], str | None]:
    """A part of a source, notes on its records that cannot be used, and why it could not be kept, if so."""
    source, number, begin, end = item
    cache = caches[source]
    part = cache.load(number) if cache else None
    if part is None or len(part.types) != end - begin:
        part = Part.unknown(end - begin)
    todo, bad = part.todo(), []
    for row in todo:
        found = records.attempt(begin + row, partial(_lengths_of, records), watch)
        if isinstance(found, BadNote):
            bad.append(found)
            part.forget(row)
        else:
            part.set(row, *found)
    fault = None
    if cache and todo:
        try:
            cache.save(number, part)
        except OSError as error:
            fault = str(error)
    return part, bad, fault


def _lengths_of(records: RecordSet, record: Record) -> tuple[Lengths, str, Stamps]:
    stamps = stamps_of(record)  # before the files are read: what changes meanwhile is measured again
    return records.measure_one(record), record.type, stamps


def _few(records: RecordSet, _: None, watch: Watching) -> tuple[Batch, list[BadNote]]:
    shortest: dict[frozenset[Kind], tuple[int, int, Lengths]] = {}
    bad = []
    for index in np.linspace(0, len(records) - 1, min(len(records), _LOOKED_AT)).round().astype(int).tolist():
        size = records.attempt(index, records.measure_one, watch)
        if isinstance(size, BadNote):
            bad.append(size)
            continue
        mix = frozenset(size.units)
        found = size.tokens, index, size
        shortest[mix] = min(shortest.get(mix, found), found, key=lambda of: of[:2])
    batch, not_decoded = records.batch(_within_bounds(sorted(shortest.values(), key=lambda of: of[:2])), watch)
    return batch, bad + not_decoded


def _within_bounds(candidates: Iterable[tuple[int, int, Lengths]]) -> list[int]:
    """The records of (tokens, index, lengths) that fit together, or bring a medium that those before them lack."""
    chosen: list[int] = []
    total = np.zeros(1 + len(KINDS), dtype=np.int64)
    for _, index, size in candidates:
        after = total + size.row()
        if (after <= _FEW.row()).all() or (after[total == 0] > 0).any():
            chosen.append(index)
            total = after
    return chosen
