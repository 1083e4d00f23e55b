"""Worker processes: the same batches, and whatever becomes of a worker, the run goes on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT, write_records
from tests.unit.data.test_loader import TINY, plan_of, record_set
from train.data.loader import StepLoader
from train.families import find

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def processor() -> Any:
    return find(TINY).load_processor(TINY)


def test_workers_decode_the_same_batches(tmp_path: Path, processor: Any) -> None:
    write_records(tmp_path)
    records = record_set(tmp_path, processor)
    plan = plan_of(records.measure()[0], epochs=1)
    here = list(StepLoader(plan, records, rank=0, world_size=1))
    there = list(StepLoader(plan, records, rank=0, world_size=1, workers=2))
    assert len(here) == len(there)
    for mine, theirs in zip(here, there, strict=True):
        for a, b in zip(mine.batches, theirs.batches, strict=True):
            assert a.records == b.records
            assert a.mel.equal(b.mel)
            assert a.patches.equal(b.patches)


class Treacherous:
    """A processor at which some records hang and some kill the process."""

    def __init__(self, processor: Any, hangs: str, crashes: str):
        self.processor, self.hangs, self.crashes = processor, hangs, crashes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "processor":
            raise AttributeError(name)
        return getattr(self.processor, name)

    def encode(self, record: Any, **options: Any) -> Any:
        if record.type == self.hangs:
            time.sleep(3600)
        if record.type == self.crashes:
            os._exit(1)
        return self.processor.encode(record, **options)


def test_a_decoder_that_hangs_or_crashes_costs_only_its_record(tmp_path: Path, processor: Any) -> None:
    write_records(tmp_path)
    file = tmp_path / "train.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[5]["type"], lines[17]["type"] = "hangs", "crashes"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    records = record_set(tmp_path, Treacherous(processor, "hangs", "crashes"))
    plan = plan_of(records.measure()[0], epochs=1)
    steps = list(StepLoader(plan, records, rank=0, world_size=1, workers=1, limit_s=2))
    seen = [index for step in steps for batch in step.batches for index in batch.records]
    assert sorted(seen) == [index for index in range(24) if index not in (5, 17)]
    notes = {note.line: note.reason for step in steps for note in step.bad}
    assert "took over 2 s" in notes[6]
    assert "crashed the decoding process" in notes[18]


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    write_records(tmp_path)
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.unit.data.test_loader import TINY, plan_of, record_set
from train.data.loader import StepLoader
from train.families import find

if __name__ == "__main__":
    records = record_set(Path({str(tmp_path)!r}), find(TINY).load_processor(TINY))
    steps = iter(StepLoader(plan_of(records.measure()[0]), records, rank=0, world_size=1, workers=1))
    next(steps)
    print("started", flush=True)
    sys.stdin.read()
"""
    (tmp_path / "owner.py").write_text(script)
    owner = subprocess.Popen(
        [sys.executable, str(tmp_path / "owner.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert owner.stdout
    assert owner.stdout.readline() == "started\n"
    group = [process for process in children(owner.pid) if process != owner.pid]
    assert len(group) >= 2  # the fork server and its worker
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{process}").exists() for process in group):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.1)


def children(process: int) -> list[int]:
    """The process and all that descend from it."""
    found = [process]
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += children(int(child))
    return found
