"""Small copies of the images and audio clips of held-out records, read under a watchdog and within bounds."""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from train.data.audio import SAMPLE_RATE, load_clip
from train.data.images import load_image
from train.data.readers import Source, open_source
from train.data.record_set import SourceSpec, Watching
from train.data.records import parse_record
from train.data.workers import Results, Workers
from train.errors import BadRecord, OmniTuneError
from train.pages.drawing import image_uri, small_clip_uri
from train.schema import Kind, MediaSource, Part, Record, file_of

log = logging.getLogger(__name__)

_SIDE = 200
"""Longest side of an image, in pixels."""

_LOSSLESS = 64
"""Longest side up to which an image is kept without loss."""

_SECONDS = 12
"""Seconds of a clip that are kept."""

_PER_RECORD = 6
"""Images and clips of a record that are kept."""

Place = tuple[str, int]
"""Where a record stands: its file as the options name it, and its line."""


@dataclass(frozen=True)
class Shown:
    """An image or clip on a page: what holds it, and what is to be known of it."""

    kind: Kind
    uri: str
    note: str


@dataclass(frozen=True)
class Bounds:
    """How much is read.

    characters: of all media together, as text. seconds: after which no further record is begun with. processes: that
    read, unless this process reads itself.
    """

    characters: int = 7_500_000
    seconds: float = 60.0
    processes: int = 2


@dataclass
class _Reader:
    """Reads the media of a record; pickled for the workers."""

    specs: list[SourceSpec]
    sources: list[Source]
    given_up: dict[int, str] = field(default_factory=dict)

    def __call__(self, item: tuple[int, int, int], watch: Watching) -> list[Shown]:
        number, source, row = item
        if number in self.given_up:
            return []
        spec, opened = self.specs[source], self.sources[source]
        try:
            with watch(number):
                record = parse_record(opened[row], root=Path(spec.root), file=spec.path, line=opened.line(row))
                return [_shown(part) for part in asked_media(record)[:_PER_RECORD]]
        except Exception as error:  # whatever a medium does, the page is made without it
            log.debug("not shown: %s", error)
            return []


def asked_media(record: Record) -> list[Part]:
    """The images and clips of the turns before the last answer, in order."""
    last = max(number for number, turn in enumerate(record.turns) if turn.role == "assistant")
    return [part for turn in record.turns[:last] for part in turn.parts if part.kind != "text"]


def read_media(
    specs: Mapping[str, SourceSpec],
    places: Iterable[Place],
    known: Mapping[Place, list[Shown]],
    bounds: Bounds,
    workers: Workers,
) -> dict[Place, list[Shown]]:
    """The media of the records at those places, as many of the first as the bounds allow.

    specs: where each file's records and media are, by the file's name in `places`. known: read before.
    """
    began, left = time.monotonic(), bounds.characters
    opened = {name: source for name, spec in specs.items() if (source := _open(spec))}
    names = list(opened)
    reader = _Reader([specs[name] for name in names], list(opened.values()))
    found: dict[Place, list[Shown]] = {}
    todo: list[tuple[Place, tuple[int, int, int]]] = []
    for place in dict.fromkeys(places):
        if place in known:
            found[place] = known[place]
            left -= _size(known[place])
        elif place[0] in opened and (row := opened[place[0]].index_of(place[1])) is not None:
            todo.append((place, (len(todo), names.index(place[0]), row)))
    if not todo or left <= 0:
        return found
    items = [item for _, item in todo]
    results = iter(Results(reader, lambda done: items[done:], reader.given_up, workers))
    for (place, _), media in zip(todo, results, strict=False):
        left -= _size(media)
        if left < 0:
            break
        found[place] = media
        if time.monotonic() - began > bounds.seconds:
            break
    return found


def _open(spec: SourceSpec) -> Source | None:
    try:
        return open_source(spec.path, spec.format)
    except OmniTuneError as error:
        log.info("the report shows no media of '%s': %s", spec.path, error)
        return None


def _size(media: list[Shown]) -> int:
    return sum(len(medium.uri) for medium in media)


def _shown(part: Part) -> Shown:
    file = file_of(part.content)
    name = "embedded" if isinstance(file, bytes) else Path(file).name
    try:
        return _image(part.content, name) if part.kind == "image" else _clip(part.content, name)
    except BadRecord:
        return Shown(part.kind, "", f"{name}: it cannot be read now")  # type: ignore[arg-type]


def _image(source: MediaSource, name: str) -> Shown:
    image = load_image(file_of(source))
    width, height = image.size
    return Shown("image", image_uri(image, _SIDE, _LOSSLESS), f"{name}, {width}×{height}")


def _clip(source: MediaSource, name: str) -> Shown:
    clip = load_clip(source, (_SECONDS + 1) * SAMPLE_RATE)
    seconds = len(clip) / SAMPLE_RATE
    kept = f"its first {_SECONDS} s" if seconds > _SECONDS else f"{seconds:.2f} s"
    return Shown("audio", small_clip_uri(clip[: _SECONDS * SAMPLE_RATE]), f"{name}, {kept}")
