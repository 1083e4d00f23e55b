"""What a page shows of a record: the tokens that the model sees, which of them are learned, and its media."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from train.data.audio import SAMPLE_RATE, clip_header, load_clip
from train.data.images import load_image
from train.data.record_set import RecordSet
from train.pages.drawing import clip_uri, image_uri, mel_uri, waveform_path
from train.schema import Kind, Media, Outline, Placed, Record, Sample, Span, Window, file_of


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens that are shown as one: a character of several tokens, or the places of an image's slice."""

    first: int
    count: int
    text: str
    weight: float
    """0 where they are not learned"""
    special: bool = False
    medium: int | None = None
    """whose places they are: an index in the record's media"""
    slice: int | None = None


@dataclass(frozen=True)
class ShownSlice:
    """A slice over its image; the box in the image's pixels."""

    x: float
    y: float
    width: float
    height: float
    pixels: tuple[int, int]


@dataclass(frozen=True)
class ShownMedium:
    """An image or a clip on the page, and what became of it on its way to the model."""

    kind: Kind
    number: int
    """among the record's media of this kind, from 1"""
    source: str
    notes: list[str]
    uri: str
    size: tuple[int, int] = (0, 0)
    """width and height of an image"""
    slices: list[ShownSlice] = field(default_factory=list)
    waveform: str = ""
    mel: str = ""


@dataclass(frozen=True)
class Tally:
    """How a record's tokens are shared out; they sum up to all of them."""

    learned: int
    text: int
    """not learned"""
    image: int
    audio: int

    @property
    def tokens(self) -> int:
        return self.learned + self.text + self.image + self.audio


@dataclass(frozen=True)
class ShownRecord:
    """A record on the page."""

    name: str
    stretches: list[Stretch]
    media: list[ShownMedium]
    tally: Tally
    cut: int
    """tokens that were cut from its end"""


def tally_of(outline: Outline) -> Tally:
    """How a record's tokens are shared out."""
    held = {"image": 0, "audio": 0}
    for medium in outline.media:
        held[medium.kind] += len(medium.places)
    learned = sum(weight > 0 for weight in outline.weights)
    return Tally(learned, len(outline.input_ids) - learned - sum(held.values()), held["image"], held["audio"])


def show(records: RecordSet, record: Record, name: str) -> ShownRecord:
    """A record as the model will see it, its media decoded; raises BadRecord."""
    outline, sample = records.outline_of(record), records.encode(record)
    whole = records.processor.measure(record).tokens
    return ShownRecord(
        name=name,
        stretches=list(_stretches(sample, outline.media, records.processor.tokenizer.backend_tokenizer)),
        media=list(_shown_media(sample, outline)),
        tally=tally_of(outline),
        cut=whole - len(outline.input_ids),
    )


def _stretches(sample: Sample, media: Sequence[Placed], tokenizer: Tokenizer) -> Iterator[Stretch]:
    """The tokens in order, those of one character or of one slice together."""
    ids, weights = sample.input_ids.tolist(), sample.loss_weights.tolist()
    specials = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    owners = {place: owner for number, medium in enumerate(media) for place, owner in _owners(number, medium)}
    begin = 0
    while begin < len(ids):
        weight, owner = weights[begin], owners.get(begin)
        end = begin + 1
        if owner:
            while end < len(ids) and owners.get(end) == owner:
                end += 1
            yield Stretch(begin, end - begin, "", weight, medium=owner[0], slice=owner[1])
        elif ids[begin] in specials:
            yield Stretch(begin, 1, str(tokenizer.id_to_token(ids[begin])), weight, special=True)
        else:
            while end < len(ids) and weights[end] == weight and end not in owners and ids[end] not in specials:
                end += 1
            yield from _characters(begin, ids[begin:end], weight, tokenizer)
        begin = end


def _owners(number: int, medium: Placed) -> Iterator[tuple[int, tuple[int, int | None]]]:
    """Each place of a medium, and (medium, slice) that it belongs to."""
    each = len(medium.places) // len(medium.slices) if medium.slices else 0
    for index, place in enumerate(medium.places):
        yield place, (number, index // each if each else None)


def _characters(first: int, ids: list[int], weight: float, tokenizer: Tokenizer) -> Iterator[Stretch]:
    """Tokens of plain text; those that are a part of a character are joined to the next."""
    stream, begin = DecodeStream(skip_special_tokens=False), 0
    for number, token in enumerate(ids):
        text = stream.step(tokenizer, token)
        if text is not None:
            yield Stretch(first + begin, number + 1 - begin, text, weight)
            begin = number + 1
    if begin < len(ids):
        yield Stretch(first + begin, len(ids) - begin, tokenizer.decode(ids[begin:], False), weight)


def _shown_media(sample: Sample, outline: Outline) -> Iterator[ShownMedium]:
    clips, numbers = _clips(sample.media), Counter[Kind]()
    for placed in outline.media:
        numbers[placed.kind] += 1
        if placed.kind == "image":
            yield _image(placed, numbers["image"])
        else:
            yield _clip(placed, numbers["audio"], next(clips, None))


def _clips(media: Mapping[Kind, Media]) -> Iterator[torch.Tensor]:
    audio = media.get("audio")
    if audio and audio.values.ndim == 2 and int(audio.sizes.sum()) == len(audio.values):
        yield from audio.values.split(audio.sizes.flatten().tolist())


def _name(placed: Placed) -> str:
    file = file_of(placed.source)
    if isinstance(file, bytes):
        return f"embedded, {len(file)} bytes"
    path = Path(file)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _clip(placed: Placed, number: int, mel: torch.Tensor | None) -> ShownMedium:
    source = placed.source
    header, clip = clip_header(source), load_clip(source)
    heard = len(clip) if placed.seconds is None else round(placed.seconds * SAMPLE_RATE)
    used = clip[:heard]
    notes = [f"{len(used) / SAMPLE_RATE:.2f} s, {len(placed.places)} tokens"]
    if mel is not None:
        notes[0] += f", {len(mel)} mel frames"
    if len(clip) - heard > SAMPLE_RATE // 10:
        notes.append(f"cut: {len(clip) / SAMPLE_RATE:.2f} s in the file")
    if isinstance(source, Window):
        begin, end, total = (samples / SAMPLE_RATE for samples in (source.begin, source.end, source.total))
        notes.append(f"a window of a recording of {total:.2f} s, from {begin:.2f} to {end:.2f} s")
        source = source.source
    if isinstance(source, Span):
        notes.append(f"a span of the file, from {source.start_s:.2f} s on")
    if header.rate != SAMPLE_RATE:
        notes.append(f"resampled from {header.rate:,} Hz to {SAMPLE_RATE:,} Hz")
    if header.channels > 1:
        notes.append(f"mean of {header.channels} channels")
    drawn = mel_uri(mel) if mel is not None and len(mel) else ""
    return ShownMedium("audio", number, _name(placed), notes, clip_uri(used), waveform=waveform_path(used), mel=drawn)


def _image(placed: Placed, number: int) -> ShownMedium:
    image = load_image(file_of(placed.source))
    width, height = image.size
    slices = [
        ShownSlice(left * width, top * height, (right - left) * width, (bottom - top) * height, part.pixels)
        for part in placed.slices
        for left, top, right, bottom in [part.box]
    ]
    notes = [f"{width}×{height} pixels, {len(placed.places)} tokens"]
    sizes = dict.fromkeys(part.pixels for part in placed.slices)
    if sizes:
        count = len(slices)
        seen = " and ".join(f"{wide}×{high}" for wide, high in sizes)
        notes.append(f"{count} slice{'s' * (count > 1)}, resized to {seen} pixels")
    return ShownMedium("image", number, _name(placed), notes, image_uri(image), size=(width, height), slices=slices)
