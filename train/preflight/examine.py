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

from train.data.audio import clip_header
from train.data.images import picture_size
from train.data.lengths import LengthCache, holds, stamps_of
from train.data.record_set import BadNote, RecordSet, Watching
from train.data.workers import Results
from train.preflight.shown import tally_of
from train.schema import Part, Record, Span, file_of

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
    digest: str
    """of its turns' texts and of the bytes of its media: equal records have the same"""
    images: tuple[tuple[int, int], ...]
    """width and height of each"""
    clips: tuple[tuple[float, int], ...]
    """seconds and sampling rate of each"""

    @property
    def tokens(self) -> int:
        return self.learned + self.text + self.image + self.audio


@dataclass
class Examined:
    """What was found in a set: the facts of each record, None where it cannot be used; why; how many were known."""

    facts: list[Facts | None]
    bad: list[BadNote]
    known: int


def examine(
    records: RecordSet, cache: LengthCache | None, on_records: Callable[[int], None] = lambda count: None
) -> Examined:
    """Read and decode every record, as training does.

    cache: where the facts are kept; what it knows is not looked at again, unless its media have changed.
    """
    folders = [cache.of(spec.path, spec.root).folder if cache else None for spec in records.specs]
    parts = [
        (source, begin, min(begin + _PART, end))
        for source, (start, end) in enumerate(pairwise([0, *records.ends.tolist()]))
        for begin in range(start, end, _PART)
    ]
    cores = len(os.sched_getaffinity(0))
    workers = replace(records.workers, count=min(cores, len(parts)) if records.workers.count else 0)
    found = Examined([], [], 0)
    job = partial(_part, records, folders)
    for facts, bad, known in Results(job, lambda done: parts[done:], records.given_up, workers):
        found.facts += facts
        found.bad += bad
        found.known += known
        on_records(len(facts))
    return found


def _part(
    records: RecordSet, folders: Sequence[Path | None], item: tuple[int, int, int], watch: Watching
) -> tuple[list[Facts | None], list[BadNote], int]:
    source, begin, end = item
    folder = folders[source]
    first = begin - (int(records.ends[source - 1]) if source else 0)
    file = folder / f"{first}-{first + end - begin}.json" if folder else None
    kept = _load(file, end - begin)
    bad, facts = [], []
    known = len(kept) - kept.count(None)
    for place, row in enumerate(kept):
        if row is None:
            found = records.attempt(begin + place, partial(_look_at, records), watch)
            if isinstance(found, BadNote):
                bad.append(found)
            else:
                kept[place] = found
        row = kept[place]
        facts.append(_facts(row[0]) if row else None)
    if file and known + len(bad) < len(kept):
        _save(file, kept)
    return facts, bad, known


def _look_at(records: RecordSet, record: Record) -> tuple[dict[str, Any], Any]:
    """The facts of a record, and its media as they were."""
    stamps = stamps_of(record)
    records.measure_one(record)
    outline = records.outline_of(record)
    records.encode(record)
    tally = tally_of(outline)
    media = [part for turn in record.turns for part in turn.parts if part.kind != "text"]
    clips = [clip_header(part.content) for part in media if part.kind == "audio"]
    facts = Facts(
        type=record.type,
        learned=tally.learned,
        text=tally.text,
        image=tally.image,
        audio=tally.audio,
        digest=_digest(record),
        images=tuple(picture_size(file_of(part.content)) for part in media if part.kind == "image"),
        clips=tuple((header.seconds or 0.0, header.rate) for header in clips),
    )
    return asdict(facts), stamps


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


def _facts(row: Any) -> Facts:
    images, clips = (tuple(tuple(one) for one in row[name]) for name in ("images", "clips"))
    return Facts(**{**row, "images": images, "clips": clips})


def _load(file: Path | None, count: int) -> list[Any]:
    """(facts, stamps) of each record that is known, and whose media have not changed; else None."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8", errors="surrogateescape")) if file else []
        if len(rows) == count:
            return [row if row and all(holds(tuple(stamp)) for stamp in row[1]) else None for row in rows]
    except (OSError, ValueError, LookupError, TypeError):  # none, or damaged
        pass
    return [None] * count


def _save(file: Path, rows: list[Any]) -> None:
    """Keep a part; written aside first. Where that fails, the next look does its work again."""
    aside = file.with_name(f"{file.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(rows, ensure_ascii=True), encoding="utf-8")
        aside.replace(file)
    except OSError:
        aside.unlink(missing_ok=True)
