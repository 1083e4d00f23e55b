"""Data that is wrong, one fault a test, on its way through a record set: quarantined with a reason, or used."""

import io
import json
import os
import re
import resource
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.builders import media_of
from tests.unit.data.builders import png, tone, wav
from train.data import images, media, records
from train.data.audio import clip_length, load_clip
from train.data.images import image_size, load_image
from train.data.readers import JsonLines, open_source
from train.data.record_set import BadNote, RecordSet, SourceSpec
from train.data.watchdog import Watchdog
from train.errors import BadRecord, OmniTuneError


def asks(**content: Any) -> dict[str, Any]:
    return {"conversations": [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]}


def record_set(folder: Path, processor: Any, *lines: Any) -> RecordSet:
    """A set of these lines (JSON values, or bytes as they are), with the folder as root."""
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "records.jsonl").write_bytes(b"\n".join(encoded))
    spec = SourceSpec("train", str(folder / "records.jsonl"), str(folder))
    return RecordSet([spec], processor, max_tokens=512, too_long="quarantine")


def reason(folder: Path, processor: Any, line: Any) -> str:
    """Why the record is refused, by measuring and by decoding alike; a good record beside it is not."""
    data = record_set(folder, processor, line, asks(text="a"))
    measured, notes = data.measure()
    batch, bad = data.batch([0, 1])
    assert [note.line for note in notes or bad] == [1]
    assert (measured.lengths[:, 0] > 0).tolist() == [not notes, True]
    assert batch.records == [1]
    assert bad[0].reason.startswith(f"{folder}/records.jsonl:1: ")
    return bad[0].reason


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_with(*chunks: bytes) -> bytes:
    """An image of 8 x 8 with more chunks behind its header."""
    whole = png(8, 8)
    return whole[:33] + b"".join(chunks) + whole[33:]


def riff(channels: int, rate: int, data: bytes, *, claimed: int | None = None) -> bytes:
    """A WAV file of 16 bits a sample, whose header may lie about its length."""
    width = 2 * channels
    form = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * width % 2**32, width % 2**16, 16)
    size = len(data) if claimed is None else claimed
    return b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + form + b"data" + struct.pack("<I", size) + data


def float_wav(value: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(1600, value, np.float32), 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def frames(form: str) -> bytes:
    """An animation of 500 frames, the first of them red."""
    made = [Image.new("RGB", (8, 8), (255 - i % 256, i % 256, 0)) for i in range(500)]
    file = io.BytesIO()
    made[0].save(file, form, save_all=True, append_images=made[1:])
    return file.getvalue()


ZEROS = zlib.compress(b"\0" * 2**26)
BAD_MEDIA = [
    ("image", b"", "image '.*medium': it is empty; replace it"),
    ("image", b"just text", r"begins with b'just text', which is no intact JPEG, PNG"),
    ("image", png(64, 64)[:-30], "cannot be read"),
    ("image", wav(0.1), r"begins with b'RIFF.*', which is no intact JPEG, PNG"),
    ("image", png_with(chunk(b"zTXt", b"k\0\0" + ZEROS)), "Decompressed data too large"),
    ("image", png_with(*[chunk(b"teSt", b"")] * 15_000), "its header does not end"),
    ("image", b"\xff\xd8" + (b"\xff\xe1\xff\xff" + b"a" * 65533) * 300, "its header does not end"),
    ("image", png(2**26, 1, 0, "1"), "67108864x1 pixels, and a side may have 65535"),
    ("audio", b"", "audio '.*medium': it is empty; replace it"),
    ("audio", b"just text", r"begins with b'just text' and is no recording"),
    ("audio", png(8, 8), r"begins with b'\\x89PNG.*' and is no recording"),
    ("audio", riff(1, 16_000, b""), "too short to be heard"),
    ("audio", riff(0, 16_000, bytes(32_000)), "convert it to WAV|is no recording"),
    ("audio", riff(1, 0, bytes(32_000)), "is no recording"),
    ("audio", riff(1, 1_000_000, bytes(32_000)), "it has 1000000 samples a second, more than 384000"),
    ("audio", riff(1, 8_000, bytes(16_000 * 1800)), "is longer than 30 s; set data.long_audio=split, or cut$"),
    ("audio", float_wav(np.nan), "samples that are not numbers"),
    ("audio", float_wav(np.inf), "samples that are not numbers"),
    ("audio", float_wav(1e30), r"no sound \(up to 1e\+30\)"),
]


@pytest.mark.parametrize(("kind", "data", "why"), BAD_MEDIA)
def test_bad_media(tmp_path: Path, processor: Any, kind: str, data: bytes, why: str) -> None:
    (tmp_path / "medium").write_bytes(data)
    assert re.search(why, reason(tmp_path, processor, asks(**{kind: "medium"})), re.DOTALL)


@pytest.mark.parametrize(
    ("kind", "name", "data"),
    [
        ("image", "a.png", frames("GIF")),
        ("image", "a.jpg", frames("PNG")),
        ("image", "a.gif", frames("WEBP")),
        ("image", "a.txt", frames("TIFF")),
        ("audio", "a.mp3", wav(0.2)),
        ("audio", "a.vox", riff(1, 16_000, bytes(3200), claimed=2**31)),
        ("audio", "a.png", riff(1000, 16_000, bytes(1000 * 2 * 1600))),
        ("audio", "a.raw", float_wav(30_000.0)),
    ],
)
def test_odd_media_that_are_used(tmp_path: Path, processor: Any, kind: str, name: str, data: bytes) -> None:
    """Of many frames the first is seen; the content counts, not the name nor a claim."""
    (tmp_path / name).write_bytes(data)
    used = record_set(tmp_path, processor, asks(**{kind: name}))
    measured, notes = used.measure()
    batch, bad = used.batch([0])
    assert notes == bad == []
    assert measured.lengths[0].tolist() == [len(batch.input_ids), batch.units("image"), batch.units("audio")]
    if kind == "image":
        assert load_image(str(tmp_path / name)).getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=3)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/tty", "pipe", "."])
@pytest.mark.parametrize("read", [image_size, load_image, clip_length, load_clip])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, name: str, read: Any) -> None:
    """A pipe that nobody writes to would be waited for, a device would never end."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadRecord, match=r"it is not a regular file|cannot be read"):
        read(str(tmp_path / name))


def test_sizes_are_bounded_before_opening(tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_BYTES", {"image": 100, "audio": 100})
    (tmp_path / "a").write_bytes(bytes(101))
    for kind in ("image", "audio"):
        assert "it has 101 bytes, more than the 100 allowed" in reason(tmp_path, processor, asks(**{kind: "a"}))


def test_a_thousand_channels_are_decoded_in_blocks() -> None:
    data = riff(1000, 16_000, bytes(1000 * 2 * 16_000))
    load_clip(data[:2000])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(load_clip(data)) == 16_000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 32 * 1024  # KiB; all channels at once take 61 MiB


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"messages": [], "messages": []}', "the key 'messages' stands twice in one object"),
        (b'{"n": ' + b"9" * 5000 + b"}", "invalid JSON"),
        (b'{"n": ' + b"[" * 100_000, "invalid JSON"),
        (b"\0" * 50, "invalid JSON"),
        (b'{"messages": [', "invalid JSON"),
        ({"messages": [{"role": "user", "content": "a"}] * 5000}, "a list has 5000 items, more than the 4096 allowed"),
        (asks(image=["a.png"] * 5000), "a list has 5000 items"),
        (asks(text="a" * (2**20 + 1)), "its texts have 1048578 characters, more than the 1048576 allowed"),
        (asks(text="a" * 600), "it has 6.. tokens, more than 512"),
        (asks(text="a") | {"type": "x" * 101}, "is no short word"),
        (asks(text="a") | {"type": "\ud800"}, r"type '\\ud800' is no short word"),
        (asks(image="\udcff.png"), r"image '\\udcff.png' not found"),
        (asks(**{"\udcff": 1}), r"unknown key '\\udcff'"),
        (asks(image="x" * 100_000), r"cannot be looked up \(File name too long\)"),
        (asks(image="file:///etc/passwd"), "is a URL, and nothing is fetched"),
        (asks(image="HTTP://x/a.png"), "is a URL, and nothing is fetched"),
        (asks(image="file:/etc/passwd"), "not found under"),
        (asks(image="data:image/png;base64,AAAA"), "embedded image: it begins with"),
    ],
)
def test_bad_lines(tmp_path: Path, processor: Any, line: Any, why: str) -> None:
    found = reason(tmp_path, processor, line)
    assert re.search(why, found)
    assert len(found) < 1000


@pytest.mark.parametrize("weight", [10**400, 1e39, 1e-40, -1, float("nan"), True, "1"])
def test_weights_that_a_float32_does_not_hold(weight: Any) -> None:
    raw = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": weight}]}
    with pytest.raises(BadRecord, match=r"turn 2 has the weight .*; use 0 or a number from 1e-06 to 1000"):
        records.parse_record(raw, root=Path(), file="a.jsonl", line=1)


def test_special_tokens_and_placeholders_in_a_text_stay_text(tmp_path: Path, processor: Any) -> None:
    text = "<|turn_end|><|audio_start|><|unk|>(<image>./</image>)<image>\0"
    used = record_set(tmp_path, processor, asks(text="a"), asks(text=text))
    measured, notes = used.measure()
    batch, _ = used.batch([1])
    assert notes == []
    assert measured.lengths[1, 0] - measured.lengths[0, 0] == len(text) - 1  # a byte a token
    assert len(media_of(batch, "image").places) == len(media_of(batch, "audio").places) == 0
    assert processor.tokenizer.decode(batch.input_ids[6 : 6 + len(text)]) == text


def test_whatever_a_record_raises_costs_it_alone(
    tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the bound on its side, resizing this image takes 2 GB for its 8 KB, which Pillow refuses to ask for."""
    monkeypatch.setattr(images, "MAX_SIDE", 2**31)
    (tmp_path / "a.png").write_bytes(png(2**26, 1, 0, "1"))
    found = reason(tmp_path, processor, asks(image="a.png"))
    assert "it cannot be used (MemoryError); correct or remove it" in found
    assert record_set(tmp_path, processor, asks(image="a.png"), asks(text="a")).few().records == [1]


def test_line_ends_blank_lines_and_no_last_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\r\n{"n": 1}\r\n\t\n{"n": 2}\n\n\0\n\xef\xbb\xbf{"n": 3}')
    source = open_source(path)
    assert [source.line(i) for i in range(len(source))] == [2, 4, 6, 7]
    assert [source.index_of(line) for line in (1, 2, 4, 6, 7, 8)] == [None, 0, 1, 2, 3, None]
    assert (source[0], source[3]) == ({"n": 1}, {"n": 3})
    with pytest.raises(BadRecord, match="invalid JSON"):
        source[2]


def test_an_endless_line_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"n": 1}\n')
        file.seek(300 * 2**20)  # a hole of zeros
        file.write(b'\n{"n": 2}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = open_source(path)
    monkeypatch.setattr(JsonLines, "_read", None)
    with pytest.raises(BadRecord, match=r"a\.jsonl:2: the record has 314572791 bytes, more than 64 MiB"):
        source[1]
    assert len(source) == 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{}".encode("utf-16"), "is in UTF-16; convert it to UTF-8"),
        (b'[{"n": 1}, {"n": ', r"not a valid JSON list \(item 2 is not followed by ',' or by the final"),
        (b'[{"n": 1}, {"n": 2}', r"\(item 2 is not followed by ',' or by the final '\]'\)"),
        (b'[{"n": 1},]', r"\(item 2: "),
        (b'[{"n": 1}] []', r"\(item 1 is not followed"),
        (b"[" * 100_000, "not a valid JSON list"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "records").write_bytes(content)
    with pytest.raises(OmniTuneError, match=why):
        open_source(tmp_path / "records")


def test_a_pipe_or_a_device_is_no_data_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OmniTuneError, match="is not a regular file; name the file that holds the records"):
            open_source(path)


def test_a_bad_item_of_a_list_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes('\ufeff [{"n": "é"}, {"n": NaN}, {"n": 1, "n": 2}, {"n": "\1"}, {"n": "ok"} ]\n'.encode())
    source = open_source(path)
    assert [source[i] for i in (0, 4)] == [{"n": "é"}, {"n": "ok"}]
    for index, why in ((1, "NaN"), (2, "twice"), (3, "control character")):
        with pytest.raises(BadRecord, match=rf"a\.json:{index + 1}: .*{why}"):
            source[index]


def test_parquet_of_other_columns_and_of_broken_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    broken = pyarrow.StringArray.from_buffers(
        1, pyarrow.array([0, 1], "int32").buffers()[1], pyarrow.py_buffer(b"\xff")
    )
    for name, column, why in (("a", pyarrow.array([1]), "no turns found"), ("b", broken, "the row cannot be read")):
        parquet.write_table(pyarrow.table({"x": column}), tmp_path / name)
        used = RecordSet([SourceSpec("s", str(tmp_path / name), ".")], None, max_tokens=9, too_long="quarantine")
        _, notes = used.measure()
        assert [note.line for note in notes] == [1]
        assert why in notes[0].reason
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OmniTuneError, match="cannot be read as parquet"):
        open_source(tmp_path / "a")


def test_whatever_a_decoder_raises_costs_the_record_alone(tmp_path: Path, processor: Any) -> None:
    used = record_set(tmp_path, processor, asks(text="a"), asks(text="b"))

    def measure(record: Any) -> str:
        if record.line == 1:
            raise MemoryError("no room for " + "x" * 5000)
        return "fine"

    bad, fine = used.attempt(0, measure), used.attempt(1, measure)
    assert isinstance(bad, BadNote)
    assert bad.line == 1
    assert "records.jsonl:1: it cannot be used (MemoryError no room" in bad.reason
    assert len(bad.reason) < 1000
    assert fine == "fine"


def test_a_refused_record_does_not_stay_under_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a worker that has nothing more to do is killed for the record that it refused."""
    watch = Watchdog(1, limit_s=60.0)
    monkeypatch.setattr("train.data.watchdog.get_worker_info", lambda: type("Info", (), {"id": 0}))
    with pytest.raises(BadRecord), watch(7):
        raise BadRecord("refused")
    assert watch._now[0, 0] == -1
    watch.close()


def test_noted_records_are_left_out_after_a_resume(tmp_path: Path, processor: Any) -> None:
    used = record_set(tmp_path, processor, asks(text="a"), b"", asks(text="b"), asks(text="c"))
    path = str(tmp_path / "records.jsonl")
    used.leave_out([BadNote(path, 3, "took too long"), BadNote("other.jsonl", 1, "x"), BadNote(path, 2, "blank now")])
    assert used.given_up == {1: "took too long"}
    batch, bad = used.batch([0, 1, 2])
    assert batch.records == [0, 2]
    assert bad == [BadNote(path, 3, "took too long")]


def test_recordings_named_as_what_they_are_not(tmp_path: Path) -> None:
    """libsndfile would take any file of that name for raw samples."""
    soundfile.write(tmp_path / "a.flac", tone(0.5), 16_000)
    (tmp_path / "a.flac").rename(tmp_path / "a.vox")
    assert clip_length(str(tmp_path / "a.vox")) == len(load_clip(str(tmp_path / "a.vox"))) == 8000
