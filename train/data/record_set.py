"""The records of several sources under one index: checked, measured, decoded."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.data.collate import collate
from train.data.lengths import LengthCache
from train.data.readers import open_source
from train.data.records import parse_record
from train.errors import BadRecord, OmniTuneError
from train.schema import Batch, Lengths, Record

_LOOKED_AT = 64
"""Most records among which `few` chooses."""

_FEW = {"tokens": 1024, "patches": 4096, "frames": 3000}
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
    """Lengths (records, 3) of tokens, patches and mel frames (0 tokens: not usable), types, source ends."""

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
    """

    def __init__(self, specs: Sequence[SourceSpec], processor: Any, *, max_tokens: int, too_long: str):
        self.specs = list(specs)
        self.processor = processor
        self._fit = {"max_tokens": max_tokens, "too_long": too_long}
        self._sources = [open_source(spec.path, spec.format) for spec in specs]
        self._ends = np.cumsum([len(source) for source in self._sources])
        self.given_up: dict[int, str] = {}
        """Records that are left out, and why: their decoding hung or crashed a worker, or `leave_out` named them."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """(source, row in the source) of a record."""
        source = int(np.searchsorted(self._ends, index, side="right"))
        return source, index - (int(self._ends[source - 1]) if source else 0)

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
            reason = f"{type(error).__name__} {error}".strip()
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
        starts = np.concatenate([[0], self._ends[:-1]]).tolist()
        for note in notes:
            for spec, source, start in zip(self.specs, self._sources, starts, strict=True):
                row = source.index_of(note.line) if spec.path == note.source else None
                if row is not None:
                    self.given_up[start + row] = note.reason

    def measure(self, cache: LengthCache | None = None) -> tuple[Measured, list[BadNote]]:
        """Lengths of every usable record, by headers alone, and notes on the others.

        What the cache knows is not measured again, unless it could not be used then.
        """
        lengths = np.zeros((len(self), 3), dtype=np.int32)
        types = [""] * len(self)
        bad: list[BadNote] = []
        for spec, source, end in zip(self.specs, self._sources, self._ends.tolist(), strict=True):
            part = slice(end - len(source), end)
            held = cache.load(spec.path, spec.root) if cache else None
            if held:
                lengths[part], types[part] = held
            todo = np.flatnonzero(lengths[part, 0] == 0) + part.start
            bad += self._measure(todo, lengths, types)
            if cache and len(todo):
                cache.save(spec.path, spec.root, lengths[part], types[part])
        return Measured(lengths, types, self._ends), bad

    def _measure(self, todo: np.ndarray, lengths: np.ndarray, types: list[str]) -> list[BadNote]:
        bad = []
        for index in map(int, todo):
            try:
                record = self.record(index)
                with self.guarded(index):
                    size = self.processor.measure(record, **self._fit)
            except BadRecord as error:
                bad.append(self.note(index, error))
            else:
                lengths[index] = size.tokens, size.patches, size.frames
                types[index] = sys.intern(record.type)  # one string for all of a kind
        return bad

    def few(self) -> Batch:
        """A small pack with every medium: the shortest of up to 64 records spread over all, one for each mix of media.

        A mix whose media are there already is left out where the pack would get too large with it.
        Raises OmniTuneError if none of the records can be used.
        """
        shortest: dict[tuple[bool, bool], tuple[int, int, Lengths]] = {}
        for index in np.linspace(0, len(self) - 1, min(len(self), _LOOKED_AT)).round().astype(int).tolist():
            try:
                with self.guarded(index):
                    size = self.processor.measure(self.record(index), **self._fit)
            except BadRecord:
                continue
            mix = size.patches > 0, size.frames > 0
            found = size.tokens, index, size
            shortest[mix] = min(shortest.get(mix, found), found, key=lambda of: of[:2])
        batch, bad = self.batch(_within_bounds(sorted(shortest.values(), key=lambda of: of[:2])))
        if not batch.records:
            why = f"; the first: {bad[0].reason}" if bad else ""
            raise OmniTuneError(f"none of the records in '{self.specs[0].path}' that were looked at can be used{why}")
        return batch

    def batch(
        self, pack: Sequence[int], watch: Callable[[int], AbstractContextManager] = nullcontext
    ) -> tuple[Batch, list[BadNote]]:
        """A pack's records decoded and laid end to end; those that fail leave their place empty.

        watch: entered with a record's index around its decoding.
        """
        samples, sources, records, bad = [], [], [], []
        for index in pack:
            try:
                if index in self.given_up:
                    raise BadRecord(self.given_up[index])
                with watch(index), self.guarded(index):
                    sample = self.processor.encode(self.record(index), **self._fit)
            except BadRecord as error:
                bad.append(self.note(index, error))
            else:
                samples.append(sample)
                sources.append(self.locate(index)[0])
                records.append(index)
        return collate(samples, sources, records), bad


def _within_bounds(candidates: Iterable[tuple[int, int, Lengths]]) -> list[int]:
    """The records of (tokens, index, lengths) that fit together, or bring a medium that those before them lack."""
    chosen: list[int] = []
    total = dict.fromkeys(_FEW, 0)
    for _, index, size in candidates:
        after = {unit: held + getattr(size, unit) for unit, held in total.items()}
        if all(after[unit] <= most for unit, most in _FEW.items()) or any(
            after[unit] and not total[unit] for unit in total
        ):
            chosen.append(index)
            total = after
    return chosen
