"""quarantine.jsonl."""

import json
from pathlib import Path

import pytest

from train.data.record_set import BadNote
from train.engine.quarantine import Quarantine
from train.errors import TooMuchBadData


def test_notes_are_written_once_and_the_limit_stops_the_run(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(file, total_records=4, max_fraction=0.2)
    assert quarantine.add([BadNote("a.jsonl", 3, "image is broken")]) == 1
    assert quarantine.add([BadNote("a.jsonl", 3, "image is broken"), BadNote("a.jsonl", 5, "图片")]) == 1
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"source": "a.jsonl", "line": 3, "reason": "image is broken"},
        {"source": "a.jsonl", "line": 5, "reason": "图片"},
    ]
    with pytest.raises(TooMuchBadData, match="3 of 4 records cannot be used, more"):
        quarantine.add([BadNote("a.jsonl", 7, "empty")])
    assert len(file.read_text().splitlines()) == 3


def lines(file: Path) -> list[int]:
    return [json.loads(line)["line"] for line in file.read_text().splitlines()]


def test_a_resumed_run_has_the_notes_of_its_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"

    def start() -> Quarantine:
        quarantine = Quarantine(file, total_records=10, max_fraction=0.5)
        quarantine.add([BadNote("a.jsonl", 3, "measured")])
        return quarantine

    first = start()
    first.add([BadNote("a.jsonl", 9, "图片 took too long"), BadNote("b.jsonl", 3, "broken")])
    state = json.loads(json.dumps(first.state()))
    first.add([BadNote("a.jsonl", 5, "after the checkpoint")])
    assert lines(file) == [3, 9, 3, 5]

    resumed = start()
    assert lines(file) == [3]
    resumed.restore(state)
    assert lines(file) == [3, 9, 3]
    assert resumed.notes == [
        BadNote("a.jsonl", 3, "measured"),
        BadNote("a.jsonl", 9, "图片 took too long"),
        BadNote("b.jsonl", 3, "broken"),
    ]
    assert resumed.state() == state
    assert resumed.add([BadNote("a.jsonl", 9, "again"), BadNote("a.jsonl", 5, "found again")]) == 1
    assert lines(file) == [3, 9, 3, 5]
    with pytest.raises(TooMuchBadData, match="6 of 10 records"):
        resumed.add([BadNote("a.jsonl", 6, "x"), BadNote("a.jsonl", 7, "y")])


def test_what_a_start_finds_anew_stays_behind_the_restored_notes(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(file, total_records=10, max_fraction=0.5)
    quarantine.add([BadNote("a.jsonl", 1, "its image is gone now")])
    quarantine.restore([{"source": "a.jsonl", "line": 2, "reason": "broken"}])
    assert lines(file) == [2, 1]


def test_ranks_that_do_not_write_restore_too() -> None:
    quarantine = Quarantine(None, total_records=10, max_fraction=0.5)
    quarantine.restore([{"source": "a.jsonl", "line": 2, "reason": "broken"}])
    assert quarantine.add([BadNote("a.jsonl", 2, "broken")]) == 0


def test_a_name_that_is_no_text_is_escaped(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    Quarantine(file, total_records=10, max_fraction=0.5).add([BadNote("\udcff.jsonl", 1, "x")])
    assert json.loads(file.read_text())["source"] == "\udcff.jsonl"


@pytest.mark.parametrize(
    ("records", "fraction", "allowed"),
    [
        (1, 0.05, 0),
        (2, 0.05, 1),
        (13, 0.05, 6),
        (100, 0.05, 10),
        (1000, 0.05, 50),
        (13, 1.0, 13),
        (13, 0.0, 0),
    ],
)
def test_a_small_set_may_lose_a_few_records(records: int, fraction: float, allowed: int) -> None:
    quarantine = Quarantine(None, total_records=records, max_fraction=fraction)
    quarantine.add(BadNote("a.jsonl", line, "broken") for line in range(allowed))
    if allowed < records:
        with pytest.raises(TooMuchBadData):
            quarantine.add([BadNote("a.jsonl", allowed, "broken")])


def test_the_message_tells_the_held_out_ones_apart() -> None:
    quarantine = Quarantine(None, total_records=13, max_fraction=0.0, held_out=3, held_out_files=["b.jsonl"])
    said = (
        r"2 of 13 records cannot be used \(1 of the 10 to train on, 1 of the 3 held out\), .*; the last one: b:1: gone"
    )
    with pytest.raises(TooMuchBadData, match=said):
        quarantine.add([BadNote("a.jsonl", 4, "a:4: broken"), BadNote("b.jsonl", 1, "b:1: gone")])
