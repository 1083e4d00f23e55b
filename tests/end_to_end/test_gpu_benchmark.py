"""The script for a GPU machine runs on a CPU too, every stage of it in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import GROUPS
from tests.runs import ROOT, clean_environment

pytestmark = pytest.mark.end_to_end

OPTIONAL = {"QLoRA, checkpointing", "full, compiled", "resume: LoRA with dropout", "resume: zero2"}
"""Stages that may be skipped: for a package or an option that is lacking, or for time."""


def benchmark(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--size", "tiny", *words]
    command += ["--folder", str(folder), "--json", str(folder / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=640)
    return done, json.loads((folder / "figures.json").read_text())["stages"]


@pytest.mark.timeout(660)  # three minutes where nothing else runs
def test_every_stage_is_reported_and_none_fails(tmp_path: Path) -> None:
    done, stages = benchmark(tmp_path)
    assert stages.keys() == {name for names in GROUPS.values() for name in names}
    for name, stage in stages.items():
        assert stage["status"] == "done" or (name in OPTIONAL and stage["status"] == "skipped"), stage
        if stage["status"] == "done":
            assert stage["figures"], name
    assert done.returncode == 0, done.stdout[-3000:]
    assert not [path for path in tmp_path.iterdir() if path.name != "figures.json"]


def test_what_the_time_does_not_suffice_for_is_reported_as_failed(tmp_path: Path) -> None:
    done, stages = benchmark(tmp_path, "--only", "kernels", "--limit-s", "0")
    assert done.returncode == 1
    assert {name: stage["why"] for name, stage in stages.items()} == dict.fromkeys(
        GROUPS["kernels"], "the time was over"
    )
