"""Whatever a file holds, each of its records is either trained on, as it was measured, or quarantined.

Some hundred cases in the suite, always the same ones; thousands with

    pytest tests/unit/data/test_fuzz.py --hypothesis-profile=thorough
"""

import io
import json
from base64 import b64encode
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.builders import media_of
from tests.unit.data.builders import PeakMemory, by_av, png_of, tone
from train.data.plan import Limits, plan_epoch
from train.data.record_set import BadNote, RecordSet, SourceSpec
from train.families.registry import find
from train.preflight.examine import examine

TINY = Path(__file__).resolve().parents[3] / "data" / "tiny"
LIMITS = Limits(512, {"image": 100_000, "audio": 100_000})

pytestmark = [
    pytest.mark.timeout(1800, method="thread"),  # a hang in a decoder ends the process with a traceback
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
]


@cache
def processor() -> Any:
    return find(TINY).load_processor(TINY)


MOST_MIB = 1024
"""What reading, measuring and decoding a record may take."""


def check(file: Path, count: int, **settings: Any) -> list[BadNote]:
    """Take a file through measuring, planning and decoding; every one of its `count` records is accounted for."""
    with PeakMemory() as peak:
        notes = notes_on(file, count, **settings)
    assert peak.mib < MOST_MIB
    return notes


def notes_on(file: Path, count: int, **settings: Any) -> list[BadNote]:
    records = RecordSet(
        [SourceSpec("fuzz", str(file), str(file.parent))],
        processor(),
        **{"max_tokens": LIMITS.tokens, "too_long": "quarantine", **settings},
    )
    measured, notes = records.measure()
    assert len(records) == count
    usable = measured.by_source()
    assert len(usable[0]) + len(notes) == count
    for pack in plan_epoch(measured.lengths, usable, [1.0], LIMITS, seed=0, epoch=0):
        batch, bad = records.batch(pack)
        assert len(batch.records) + len(bad) == len(pack)
        notes += bad
        if not batch.records:
            continue
        found = [len(batch.input_ids), batch.units("image"), batch.units("audio")]
        assert found == measured.lengths[batch.records].sum(axis=0).tolist()
        assert sum(height * width for height, width in media_of(batch, "image").sizes.tolist()) == found[1]
        assert media_of(batch, "audio").sizes.sum() == found[2]
        assert media_of(batch, "audio").values.isfinite().all()
        assert batch.loss_weights.isfinite().all()
        assert len(media_of(batch, "image").places) == processor().image_processor.image_feature_size * len(
            media_of(batch, "image").sizes
        )
    assert {note.line for note in examine(records, None).bad} == {note.line for note in notes}
    for note in notes:
        assert f"{file}:{note.line}: " in note.reason or note.reason.startswith(str(file))
        assert len(note.reason) < 2000 + 4 * len(str(file))
        note.reason.encode()
    return notes


VALID: list[dict[str, Any]] = [
    {
        "type": "caption",
        "conversations": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": {"text": "What is it?", "image": ["a.png", "a.png"], "audio": "a.wav"}},
            {"role": "assistant", "content": {"text": "A kettle."}, "weight": 0.5},
        ],
    },
    {
        "image": "a.png",
        "audio": ["a.wav"],
        "conversations": [
            {"from": "human", "value": "<image>\nWhat do <audio> you see?"},
            {"from": "gpt", "value": "A <image> kettle. <|turn_end|>"},
        ],
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Look."},
                    {"type": "image_url", "image_url": {"url": "a.png"}},
                    {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
                    {"type": "audio", "audio": {"path": "a.wav", "bytes": None}},
                ],
            },
            {"role": "observation", "content": "{}"},
            {"role": "assistant", "content": "Seen."},
        ]
    },
]

WORDS = [
    *("role", "content", "text", "image", "audio", "images", "from", "value", "type", "weight", "messages"),
    *("user", "assistant", "system", "observation", "human", "gpt", "image_url", "input_audio", "url", "data", "path"),
    *("a.png", "a.wav", "../a.png", "/dev/zero", "pipe", ".", "file:///etc/passwd", "http://localhost/a.png"),
    *("data:image/png;base64,", "data:image/png;base64,AAAA", "data:,x", "<image>", "<audio>\n", "<|audio_start|>"),
    *("\ud800", "\udcff.png", "\0", "a\0.png", "\ufeff", "x" * 3000),
]
TEXTS = st.sampled_from(WORDS) | st.text(st.characters(), max_size=8)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 1e308, 1e-320, 2**63])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=10
)


@st.composite
def changed_records(draw: Any) -> Any:
    """A valid record with some of its values replaced, removed or repeated."""
    record = json.loads(json.dumps(draw(st.sampled_from(VALID))))
    for _ in range(draw(st.integers(0, 3))):
        holder: Any = record
        while True:
            keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(holder[key], dict | list) and draw(st.booleans()):
                holder = holder[key]
                continue
            what = draw(st.sampled_from(["replace", "remove", "repeat"]))
            if what == "replace":
                holder[key] = draw(VALUES)
            elif what == "remove":
                del holder[key]
            elif isinstance(holder, list):
                holder.insert(key, holder[key])
            else:
                holder[draw(TEXTS)] = holder[key]
            break
    return record


def as_line(value: Any, plain: bool) -> bytes:
    return json.dumps(value, ensure_ascii=not plain).encode("utf-8", "surrogatepass")


BYTES = st.binary(max_size=40).map(lambda data: data.replace(b"\n", b""))


class Wide(NamedTuple):
    """A list of very many equal values, written out only when it is used: hypothesis keeps what it has drawn."""

    unit: bytes
    count: int

    def line(self) -> bytes:
        return b"[" + b",".join([self.unit] * self.count) + b"]"


WIDE = st.builds(
    Wide,
    st.sampled_from([b"[]", b"{}", b'{"a":1}', b'""', b"1.5", b"[[[]]]"]),
    st.sampled_from([10, 1000, 10**5, 3 * 10**6]),
)
LINES = st.one_of(*[st.builds(as_line, changed_records() | VALUES, st.booleans()) | BYTES] * 150, WIDE)
CUTS = st.none() | st.floats(0, 1)


@pytest.fixture(scope="module")
def folder() -> Any:
    with TemporaryDirectory() as name:
        Path(name, "a.png").write_bytes(media()["PNG"])
        Path(name, "a.wav").write_bytes(media()["WAV"])
        yield Path(name)


@given(lines=st.lists(LINES, min_size=1, max_size=6), end=st.sampled_from([b"\n", b"\r\n"]), cut=CUTS)
def test_any_lines(folder: Path, lines: list[bytes | Wide], end: bytes, cut: float | None) -> None:
    written = [line.line() if isinstance(line, Wide) else line for line in lines]
    content = b'{"messages": []}' + end + end.join(written)
    content = content if cut is None else content[: max(int(cut * len(content)), 20)]
    file = folder / "records.jsonl"
    file.write_bytes(content)
    filled = [line for line in content.split(b"\n") if line.strip(b" \t\r")]
    check(file, len(filled), too_long="cut_text" if len(content) % 2 else "quarantine")


@given(records=st.lists(changed_records() | VALUES, min_size=1, max_size=4), plain=st.booleans())
def test_any_list(folder: Path, records: list[Any], plain: bool) -> None:
    file = folder / "records.json"
    file.write_bytes(as_line(records, plain))
    check(file, len(records))


@cache
def media() -> dict[str, bytes]:
    """A small valid file of each format, by its name."""
    encoded = {}
    shades = np.add.outer(3 * np.arange(24), 5 * np.arange(30))
    image = Image.fromarray(np.stack([shades, 255 - shades, shades // 2], axis=2).astype(np.uint8))
    tags = Image.Exif()
    tags[0x0112] = 6
    more = {
        "JPEG": {"exif": tags},
        "PNG": {"exif": tags},
        "GIF": {"save_all": True, "append_images": [image.rotate(90)], "comment": b"two frames"},
        "WEBP": {},
        "TIFF": {"compression": "tiff_lzw", "save_all": True, "append_images": [image]},
        "BMP": {},
        "PPM": {},
    }
    for name, options in more.items():
        file = io.BytesIO()
        image.save(file, name, **options)
        encoded[name] = file.getvalue()
    subtypes = {
        "WAV": "FLOAT",
        "FLAC": None,
        "OGG": "VORBIS",
        "OPUS": "OPUS",
        "MP3": None,
        "AIFF": None,
        "CAF": "ALAC_16",
    }
    for name, subtype in subtypes.items():
        file = io.BytesIO()
        form = {"OPUS": "OGG"}.get(name, name)
        soundfile.write(file, tone(0.1, channels=2), 16_000, format=form, subtype=subtype)
        encoded[name] = file.getvalue()
    return encoded | {"M4A": by_av(tone(0.2), 16_000, "mp4", "aac")}


IMAGES = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
SOUNDS = ("WAV", "FLAC", "OGG", "OPUS", "MP3", "AIFF", "CAF", "M4A")
EDGES = [0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]


def damage(names: tuple[str, ...]) -> Any:
    """A valid file of one of these formats, damaged."""
    return st.sampled_from(names).flatmap(lambda name: changed(media()[name], least=1))


@st.composite
def changed(draw: Any, whole: bytes, least: int = 0) -> bytes:
    """A file with bits turned, numbers set to edge values, pieces cut, repeated or taken from another."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(least, 4))):
        # Headers are where it matters most.
        at = draw(st.integers(0, min(80, len(data)) - 1) | st.integers(0, len(data) - 1)) if data else 0
        what = draw(st.sampled_from(["bit", "number", "cut", "drop", "repeat", "splice", "insert"]))
        length = draw(st.integers(1, 64))
        if what == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "number":
            size, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(["little", "big"]))
            value = draw(st.sampled_from(EDGES)) % 2 ** (8 * size)
            data[at : at + size] = value.to_bytes(size, order)
        elif what == "cut":
            del data[at:]
        elif what == "drop":
            del data[at : at + length]
        elif what == "repeat":
            data[at:at] = data[at : at + length]
        elif what == "splice":
            other = media()[draw(st.sampled_from(IMAGES + SOUNDS))]
            data[at : at + length] = other[draw(st.integers(0, len(other) - 1)) :][:length]
        else:
            data[at:at] = draw(st.binary(max_size=16))
    return bytes(data)


def asks_about(kind: str, name: str) -> dict[str, Any]:
    question = {"role": "user", "content": {kind: name}}
    return {"conversations": [question, {"role": "assistant", "content": "It."}]}


@given(data=damage(IMAGES), name=st.sampled_from(["a.jpg", "a.png", "a.txt"]))
def test_damaged_images(data: bytes, name: str) -> None:
    through_damaged_medium("image", data, name)


@given(data=damage(SOUNDS), name=st.sampled_from(["a.wav", "a.vox", "a.mp3"]))
def test_damaged_recordings(data: bytes, name: str) -> None:
    through_damaged_medium("audio", data, name)


SIDES = [1, 2, 13, 14, 448, 1000, 4096, 8192, 2**16 - 1, 2**16, 2**22, 2**26, 2**31 - 1]
MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "TIFF": ["1", "L", "RGBA", "CMYK", "LAB", "I", "I;16", "F"],
    "JPEG": ["L", "RGB", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["P"],
    "BMP": ["1", "L", "RGB"],
    "PPM": ["1", "L", "RGB", "I"],
}


@st.composite
def shapes(draw: Any) -> bytes:
    """An image of any mode and shape, or one that claims a shape that it cannot have."""
    width, height = draw(st.sampled_from(SIDES)), draw(st.sampled_from(SIDES))
    form = draw(st.sampled_from(sorted(MODES)))
    limit = {"JPEG": 65_500, "WEBP": 16_383}.get(form, 2**16 - 1)
    if width * height > 2**20 or max(width, height) > limit:
        return png_of(width, height)
    file = io.BytesIO()
    Image.new(draw(st.sampled_from(MODES[form])), (width, height)).save(file, form)
    return file.getvalue()


@given(data=shapes().flatmap(changed))
def test_images_of_any_shape(data: bytes) -> None:
    through_damaged_medium("image", data, "a.png")


ENCODINGS = {
    ("mp4", "aac"): [1, 2, 6, 8],
    ("ogg", "libopus"): [1, 2, 6, 8],
    ("matroska", "libopus"): [1, 2, 6, 8],
    ("matroska", "pcm_s16le"): [1, 2, 3, 6, 7, 8, 9, 16, 64, 65, 100],
    ("wav", "soundfile"): [1, 2, 6, 8, 16, 64, 65, 255, 1000],
    ("flac", "flac"): [1, 2, 6, 8],
}


@cache
def many_channels(form: str, codec: str, channels: int, samples: int, rate: int) -> bytes:
    if codec == "soundfile":
        file = io.BytesIO()
        soundfile.write(file, tone(samples / rate, rate, channels), rate, format=form)
        return file.getvalue()
    return by_av(tone(samples / rate, rate, channels), rate, form, codec)


@st.composite
def channels(draw: Any) -> bytes:
    """A recording of any number of channels."""
    form, codec = draw(st.sampled_from(sorted(ENCODINGS)))
    count = draw(st.sampled_from(ENCODINGS[form, codec]))
    samples = draw(st.sampled_from([1, 100, 1024, 4800, 48_000 if count < 16 else 9600]))
    return many_channels(form, codec, count, samples, draw(st.sampled_from([8000, 16_000, 48_000])))


@given(data=channels().flatmap(changed))
def test_recordings_of_any_channels(data: bytes) -> None:
    through_damaged_medium("audio", data, "a.m4a")


def through_damaged_medium(kind: str, data: bytes, name: str) -> None:
    with TemporaryDirectory() as made:
        Path(made, f"{kind}-{name}").write_bytes(data)
        file = Path(made, "records.jsonl")
        file.write_text(json.dumps(asks_about(kind, f"{kind}-{name}")))
        check(file, 1)


@pytest.mark.parametrize("name", IMAGES + SOUNDS)
def test_undamaged_media_are_used(tmp_path: Path, name: str) -> None:
    """Else the fuzz would only ever see refusals."""
    kind = "image" if name in IMAGES else "audio"
    (tmp_path / "medium").write_bytes(media()[name])
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(asks_about(kind, "medium")))
    assert check(file, 1) == []


@pytest.mark.parametrize("index", range(3))
def test_unchanged_records_are_used(folder: Path, index: int) -> None:
    file = folder / "valid.jsonl"
    file.write_text(json.dumps(VALID[index]).replace("UklGRg==", b64encode(media()["WAV"]).decode()))
    assert check(file, 1) == []
