"""quarantine.jsonl."""

import json
from pathlib import Path

import pytest

from train.data.record_set import BadNote
from train.engine.quarantine import Quarantine
from train.errors import TooMuchBadData


def test_notes_are_written_once_and_the_limit_stops_the_run(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(file, total_records=10, max_fraction=0.2)
    assert quarantine.add([BadNote("a.jsonl", 3, "picture is broken")]) == 1
    assert quarantine.add([BadNote("a.jsonl", 3, "picture is broken"), BadNote("a.jsonl", 5, "图片")]) == 1
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"source": "a.jsonl", "line": 3, "reason": "picture is broken"},
        {"source": "a.jsonl", "line": 5, "reason": "图片"},
    ]
    with pytest.raises(TooMuchBadData, match="3 of 10 records"):
        quarantine.add([BadNote("a.jsonl", 7, "empty")])
    assert len(file.read_text().splitlines()) == 3
