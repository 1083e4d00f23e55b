"""Lengths that are kept: for as long as the record file, the settings and the media are the same."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data.builders import png, wav
from tests.unit.data.test_wrong_data import asks, record_set
from train.data import lengths
from train.data import record_set as record_set_module
from train.data.lengths import LengthCache, Part
from train.data.record_set import Measured, RecordSet
from train.schema import Lengths


def measure(data: RecordSet, cache: LengthCache | None) -> tuple[Measured, list[int], list[int]]:
    """The lengths, the lines that cannot be used, and the lines that were measured anew."""
    asked = []
    whole = data.measure_one
    data.measure_one = lambda record: asked.append(record.line) or whole(record)  # type: ignore[method-assign]
    measured, bad = data.measure(cache)
    return measured, [note.line for note in bad], asked


@pytest.fixture
def lines(tmp_path: Path) -> list[Any]:
    """A text, an image, a recording, an image beside another, and what cannot be used."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png(28, 28))
    (tmp_path / "a.wav").write_bytes(wav(0.5))
    return [
        asks(text="one") | {"type": "图"},
        asks(image="a.png"),
        asks(audio="a.wav"),
        asks(image=["b.png", "a.png"]),
        {"conversations": []},
    ]


def test_what_is_known_is_not_measured_again(tmp_path: Path, processor: Any, lines: list[Any]) -> None:
    cache = LengthCache(tmp_path / "cache", ["settings"])
    first, bad, asked = measure(record_set(tmp_path, processor, *lines), cache)
    assert (bad, asked) == ([5], [1, 2, 3, 4])
    second, bad, asked = measure(record_set(tmp_path, processor, *lines), cache)
    assert (bad, asked) == ([5], [])  # the unusable one was tried again, and not parsed
    assert np.array_equal(first.lengths, second.lengths)
    assert first.types == second.types == ["图", "", "", "", ""]
    for other in (LengthCache(tmp_path / "cache", ["others"]), None):
        assert measure(record_set(tmp_path, processor, *lines), other)[2] == [1, 2, 3, 4]
    assert measure(record_set(tmp_path, processor, *lines, asks(text="more")), cache)[2] == [1, 2, 3, 4, 6]


def test_media_that_changed_are_measured_again(tmp_path: Path, processor: Any, lines: list[Any]) -> None:
    cache = LengthCache(tmp_path / "cache", 1)
    before, _, _ = measure(record_set(tmp_path, processor, *lines), cache)
    (tmp_path / "a.png").write_bytes(png(896, 448))
    (tmp_path / "a.wav").unlink()
    after, bad, asked = measure(record_set(tmp_path, processor, *lines), cache)
    assert (bad, asked) == ([3, 5], [2, 4])
    plain, _, _ = measure(record_set(tmp_path, processor, *lines), None)
    assert np.array_equal(after.lengths, plain.lengths)
    assert after.lengths[1, 1] > before.lengths[1, 1]
    assert after.lengths[2].tolist() == [0, 0, 0]
    # the same size, but written later
    os.utime(tmp_path / "b.png", ns=(1, 1))
    (tmp_path / "a.wav").write_bytes(wav(0.5))
    _, bad, asked = measure(record_set(tmp_path, processor, *lines), cache)
    assert (bad, asked) == ([5], [3, 4])
    assert measure(record_set(tmp_path, processor, *lines), cache)[2] == []


def test_finished_parts_survive_a_kill(
    tmp_path: Path, processor: Any, lines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (lengths, record_set_module):
        monkeypatch.setattr(module, "PART", 2)
    cache = LengthCache(tmp_path / "cache", 1)
    killed = record_set(tmp_path, processor, *lines)

    def kill(record: Any) -> Lengths:
        if record.line == 4:
            raise KeyboardInterrupt
        return RecordSet.measure_one(killed, record)

    killed.measure_one = kill  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        killed.measure(cache)
    counts: list[int] = []
    again = record_set(tmp_path, processor, *lines)
    again.measure(cache, counts.append)
    assert counts == [2, 2, 1]
    assert measure(record_set(tmp_path, processor, *lines), cache)[2] == []
    killed = record_set(tmp_path, processor, *lines, asks(text="another file of records"))
    killed.measure_one = kill  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        killed.measure(cache)
    assert measure(record_set(tmp_path, processor, *lines, asks(text="another file of records")), cache)[2] == [3, 4, 6]


@pytest.mark.parametrize("folder", ["in the way", "/proc/lengths"])
def test_a_cache_that_cannot_be_written_only_warns(
    tmp_path: Path, processor: Any, lines: list[Any], folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    """/proc takes no folder, not even from root: what a read-only disk does."""
    (tmp_path / "in the way").write_text("a file")
    found, bad, _ = measure(record_set(tmp_path, processor, *lines), LengthCache(tmp_path / folder, 1))
    assert (found.lengths[:4, 0] > 0).all()
    assert bad == [5]
    assert caplog.text.count("lengths cannot be kept") == 1
    assert folder in caplog.text


def test_a_damaged_part_is_measured_anew(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({}))
    cache = LengthCache(tmp_path / "cache", 1).of(str(tmp_path / "a.jsonl"), ".")
    stamps = [[], [("/\udcff/é", 1, 2), ("/b", 2**40, -3)]]
    cache.save(7, Part(np.ones((2, 3), np.int32), ["图", "b"], stamps))
    held = cache.load(7)
    assert held
    assert (held.lengths.tolist(), held.types, held.stamps) == ([[1, 1, 1]] * 2, ["图", "b"], stamps)
    assert cache.load(6) is None
    (file,) = cache.folder.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    assert cache.load(7) is None
