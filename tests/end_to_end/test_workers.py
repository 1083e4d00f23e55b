"""Worker processes: the same batches, and whatever becomes of a worker, the run goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.builders import media_of
from tests.runs import ROOT, write_records
from tests.unit.data.test_loader import TINY, plan_of, record_set
from train.data.lengths import LengthCache
from train.data.loader import StepLoader
from train.data.record_set import RecordSet
from train.data.workers import Workers
from train.errors import OmniTuneError
from train.families.registry import find

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def processor() -> Any:
    return find(TINY).load_processor(TINY)


def test_workers_decode_the_same_batches(tmp_path: Path, processor: Any) -> None:
    write_records(tmp_path)
    records = record_set(tmp_path, processor)
    plan = plan_of(records.measure()[0], epochs=1)
    here = list(StepLoader(plan, records, rank=0, world_size=1))
    there = list(StepLoader(plan, record_set(tmp_path, processor, workers=Workers(2)), rank=0, world_size=1))
    assert len(here) == len(there)
    for mine, theirs in zip(here, there, strict=True):
        for a, b in zip(mine.batches, theirs.batches, strict=True):
            assert a.records == b.records
            assert media_of(a, "audio").values.equal(media_of(b, "audio").values)
            assert media_of(a, "image").values.equal(media_of(b, "image").values)


class Treacherous:
    """A processor at which records hang, kill the process, or are killed from outside, by their type.

    "<stage> hangs" and "<stage> crashes" do so at every try, "<stage> killed" only at the first; stages are measure,
    encode and prompt. Each try is a line of the file `tries`.
    """

    def __init__(self, processor: Any, tries: Path):
        self.processor, self.tries = processor, tries

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "processor":
            raise AttributeError(name)
        return getattr(self.processor, name)

    def betray(self, stage: str, record: Any) -> None:
        if not record.type.startswith(stage):
            return
        with self.tries.open("a") as file:
            file.write(f"{record.type}\n")
        if record.type.endswith("hangs"):
            time.sleep(3600)
        if record.type.endswith("crashes"):
            os._exit(1)
        if record.type.endswith("killed") and self.tries.read_text().splitlines().count(record.type) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def measure(self, record: Any, **options: Any) -> Any:
        self.betray("measure", record)
        return self.processor.measure(record, **options)

    def encode(self, record: Any, **options: Any) -> Any:
        self.betray("encode", record)
        return self.processor.encode(record, **options)

    def prompt(self, record: Any, **options: Any) -> Any:
        self.betray("prompt", record)
        return self.processor.prompt(record, **options)


def treacherous_set(folder: Path, processor: Any, types: dict[int, str], workers: int = 1) -> RecordSet:
    """24 records of the sample, some of other types."""
    write_records(folder)
    file = folder / "train.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for index, name in types.items():
        lines[index]["type"] = name
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return record_set(folder, Treacherous(processor, folder / "tries"), workers=Workers(workers, limit_s=2))


def test_a_decoder_that_hangs_or_crashes_costs_only_its_record(tmp_path: Path, processor: Any) -> None:
    records = treacherous_set(tmp_path, processor, {5: "encode hangs", 17: "encode crashes", 20: "encode killed"})
    plan = plan_of(record_set(tmp_path, processor).measure()[0], epochs=1)
    steps = list(StepLoader(plan, records, rank=0, world_size=1))
    seen = [index for step in steps for batch in step.batches for index in batch.records]
    assert sorted(seen) == [index for index in range(24) if index not in (5, 17)]
    notes = {note.line: note.reason for step in steps for note in step.bad}
    assert set(notes) == {6, 18}
    assert "took over 2 s" in notes[6]
    assert "crashed the decoding process" in notes[18]
    tries = (tmp_path / "tries").read_text().splitlines()
    assert [tries.count(f"encode {fate}") for fate in ("hangs", "crashes")] == [2, 2]
    assert tries.count("encode killed") >= 2


def test_measuring_is_watched_too(tmp_path: Path, processor: Any) -> None:
    records = treacherous_set(tmp_path, processor, {5: "measure hangs", 17: "measure crashes", 20: "measure killed"})
    measured, bad = records.measure(LengthCache(tmp_path / "cache", 1))
    assert {note.line: "took over 2 s" in note.reason for note in bad} == {6: True, 18: False}
    assert (np.flatnonzero(measured.lengths[:, 0] == 0)).tolist() == [5, 17]
    again, bad = record_set(tmp_path, processor).measure(LengthCache(tmp_path / "cache", 1))
    assert not bad
    assert (again.lengths[:, 0] > 0).all()


def test_the_exports_check_survives_a_file_that_hangs(tmp_path: Path, processor: Any) -> None:
    """The next record of its mix takes its place."""
    write_records(tmp_path)
    mixes: dict[tuple[bool, bool], list[tuple[int, int]]] = {}
    for index, (tokens, *media) in enumerate(record_set(tmp_path, processor).measure()[0].lengths.tolist()):
        mixes.setdefault((media[0] > 0, media[1] > 0), []).append((tokens, index))
    by_length = [[index for _, index in sorted(of_mix)] for of_mix in mixes.values()]
    records = treacherous_set(tmp_path, processor, {by_length[0][0]: "encode hangs"})
    assert sorted(records.few().records) == sorted([by_length[0][1], *(indices[0] for indices in by_length[1:])])
    assert set(records.given_up) == {by_length[0][0]}


@pytest.mark.parametrize("pin_memory", [False, True])
def test_an_idle_worker_that_is_killed_ends_nothing(tmp_path: Path, processor: Any, pin_memory: bool) -> None:
    """Killed while it waits, with decoded batches that nobody has taken yet."""
    write_records(tmp_path)
    records = record_set(tmp_path, processor, workers=Workers(2))
    plan = plan_of(record_set(tmp_path, processor).measure()[0], epochs=1)
    loader = StepLoader(plan, records, rank=0, world_size=1, pin_memory=pin_memory and torch.cuda.is_available())
    before = set(children(os.getpid()))
    seen: list[int] = []
    for number, fetched in enumerate(loader):
        assert not fetched.bad
        seen += [index for batch in fetched.batches for index in batch.records]
        if number in (0, 1):
            time.sleep(1)  # all that may be decoded ahead is
            for process in set(children(os.getpid())) - before:
                if "forkserver" in Path(f"/proc/{process}/cmdline").read_text() and not children(process)[1:]:
                    os.kill(process, signal.SIGKILL)
    assert sorted(seen) == list(range(24))
    assert not records.given_up


@pytest.mark.parametrize("size", [0, 2**20], ids=["small", "larger than a pipe"])
def test_workers_that_cannot_begin_end_the_run_with_a_word(tmp_path: Path, processor: Any, size: int) -> None:
    write_records(tmp_path)
    records = record_set(tmp_path, Unreadable(processor), workers=Workers(1))
    records.given_up[99] = "x" * size
    with pytest.raises(OmniTuneError, match=r"processes that read records end before they have read any .*workers=0"):
        records.measure()


class Unreadable:
    """A processor that ends the process in which it is unpickled."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    write_records(tmp_path)
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.unit.data.test_loader import TINY, plan_of, record_set
from train.data.loader import StepLoader
from train.data.workers import Workers
from train.families.registry import find

if __name__ == "__main__":
    records = record_set(Path({str(tmp_path)!r}), find(TINY).load_processor(TINY), workers=Workers(1))
    steps = iter(StepLoader(plan_of(records.measure()[0]), records, rank=0, world_size=1))
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
