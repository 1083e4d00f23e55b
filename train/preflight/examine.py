"""Every record of a set read and decoded, on all cores; what was found is kept, so that a killed look goes on."""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from train.data.audio import clip_header
from train.data.images import image_size
from train.data.lengths import LengthCache, Stamps, holds, stamps_of
from train.data.record_set import BadNote, Measured, RecordSet, Watching
from train.data.workers import Results
from train.schema import KINDS, Part, Record, Span, file_of

_PART = 128
"""Records that are kept together: a second's work, after which a killed look goes on."""


@dataclass(frozen=True)
class Facts:
    """What a record that can be used holds."""

    type: str
    learned: int
    """tokens, as in `shown.Tally`"""
    text: int
    image: int
    audio: int
    units: tuple[int, ...]
    """of each of KINDS"""
    digest: str
    """of its turns' texts and of the bytes of its media: equal records have the same"""
    images: tuple[tuple[int, int], ...]
    """width and height of each"""
    clips: tuple[tuple[float, int], ...]
    """seconds and sampling rate of each"""

    @property
    def tokens(self) -> int:
        return self.learned + self.text + self.image + self.audio


_Row = tuple[Facts, Stamps]
"""The facts of a record, and its media as they were."""


@dataclass
class Examined:
    """What was found in a set: the facts of each record, None where it cannot be used; why; how many were known."""

    facts: list[Facts | None]
    bad: list[BadNote]
    known: int

    def measured(self, records: RecordSet) -> Measured:
        """The lengths of the records, as `RecordSet.measure` finds them."""
        rows = [(facts.tokens, *facts.units) if facts else (0,) * (1 + len(KINDS)) for facts in self.facts]
        types = [facts.type if facts else "" for facts in self.facts]
        return Measured(np.array(rows, np.int32), types, records.ends)


def examine(
    records: RecordSet, cache: LengthCache | None, on_records: Callable[[int], None] = lambda count: None
) -> Examined:
    """Read every record and decode its media, as training does; what the towers read of them is not computed.

    cache: where the facts are kept; what it knows is not looked at again, unless its media have changed.
    """
    folders = [cache.of(spec.path, spec.root).folder if cache else None for spec in records.specs]
    parts = [
        (source, begin, min(begin + _PART, end))
        for source, (start, end) in enumerate(pairwise([0, *records.ends.tolist()]))
        for begin in range(start, end, _PART)
    ]
    kept = [_load(_file(records, folders, part), part[2] - part[1]) for part in parts]
    todo = [(part, rows) for part, rows in zip(parts, kept, strict=True) if None in rows]
    cores = len(os.sched_getaffinity(0))
    workers = replace(records.workers, count=min(cores, len(todo)) if records.workers.count else 0)
    job = partial(_part, records, folders)
    looked_at = iter(Results(job, lambda done: todo[done:], records.given_up, workers)) if todo else iter(())
    found = Examined([], [], 0)
    for rows in kept:
        found.known += len(rows) - rows.count(None)
        if None in rows:
            rows, bad = next(looked_at)
            found.bad += bad
        found.facts += [row[0] if row else None for row in rows]
        on_records(len(rows))
    return found


def _file(records: RecordSet, folders: Sequence[Path | None], part: tuple[int, int, int]) -> Path | None:
    """Where the facts of a part are kept: its records are counted from the beginning of their source."""
    source, begin, end = part
    first = begin - (int(records.ends[source - 1]) if source else 0)
    folder = folders[source]
    return folder / f"{first}-{first + end - begin}.json" if folder else None


def _part(
    records: RecordSet,
    folders: Sequence[Path | None],
    item: tuple[tuple[int, int, int], list[_Row | None]],
    watch: Watching,
) -> tuple[list[_Row | None], list[BadNote]]:
    """The rows of a part with those filled in that were not known, and notes on the records that cannot be used."""
    part, rows = item
    bad: list[BadNote] = []
    done = list(rows)
    for place, row in enumerate(rows):
        if row is None:
            found = records.attempt(part[1] + place, partial(_look_at, records), watch)
            if isinstance(found, BadNote):
                bad.append(found)
            else:
                done[place] = found
    file = _file(records, folders, part)
    if file and done != rows:
        _save(file, done)
    return done, bad


def _look_at(records: RecordSet, record: Record) -> _Row:
    """The facts of a record, and its media as they were."""
    stamps = stamps_of(record)
    outline = records.outline_of(record, decode_media=True)
    places = {kind: sum(len(held.places) for held in outline.media if held.kind == kind) for kind in KINDS}
    learned = sum(weight > 0 for weight in outline.weights)
    media = [part for turn in record.turns for part in turn.parts if part.kind != "text"]
    clips = [clip_header(part.content) for part in media if part.kind == "audio"]
    facts = Facts(
        type=record.type,
        learned=learned,
        text=len(outline.input_ids) - learned - sum(places.values()),
        image=places["image"],
        audio=places["audio"],
        units=tuple(sum(held.units for held in outline.media if held.kind == kind) for kind in KINDS),
        digest=_digest(record),
        images=tuple(image_size(file_of(part.content)) for part in media if part.kind == "image"),
        clips=tuple((header.seconds or 0.0, header.rate) for header in clips),
    )
    return facts, stamps


def _digest(record: Record) -> str:
    state = hashlib.blake2b(digest_size=16)
    for turn in record.turns:
        for part in turn.parts:
            state.update(f"{turn.role} {part.kind} ".encode() + _content_digest(part))
    return state.hexdigest()


def _content_digest(part: Part) -> bytes:
    content = file_of(part.content)
    span = f"{part.content.start_s} {part.content.end_s}".encode() if isinstance(part.content, Span) else b""
    if isinstance(content, str) and part.kind != "text":
        with Path(content).open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest() + span
    return hashlib.blake2b(content if isinstance(content, bytes) else content.encode()).digest() + span


def _load(file: Path | None, count: int) -> list[_Row | None]:
    """What is known of each record, None where it is not, or the media have changed."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8", errors="surrogateescape")) if file else []
        if len(rows) == count:
            return [_read(row) if row and all(holds(tuple(stamp)) for stamp in row[1]) else None for row in rows]
    except (OSError, ValueError, LookupError, TypeError):  # none, or damaged
        pass
    return [None] * count


def _read(row: Any) -> _Row:
    held, stamps = row
    images, clips = (tuple(tuple(one) for one in held[name]) for name in ("images", "clips"))
    return Facts(**{**held, "units": tuple(held["units"]), "images": images, "clips": clips}), stamps


def _save(file: Path, rows: Sequence[_Row | None]) -> None:
    """Keep a part; written aside first. Where that fails, the next look does its work again."""
    aside = file.with_name(f"{file.name}.{socket.gethostname()}.{os.getpid()}.partial")
    written = [row and (asdict(row[0]), row[1]) for row in rows]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(written, ensure_ascii=True), encoding="utf-8")
        aside.replace(file)
    except OSError:
        aside.unlink(missing_ok=True)
