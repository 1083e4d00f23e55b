"""The benchmark of the real size, with a cousin of the published layout: several shards, 50 million parameters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, clean_environment

pytestmark = pytest.mark.end_to_end


def test_a_first_users_whole_way_at_the_published_layout(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/real_size.py", "--size", "small", "--json", str(figures)]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)], cwd=ROOT, env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(figures.read_text())
    assert 45e6 < found["parameters"] < 60e6
    stages = {row["stage"]: row["peak GiB"] for row in found["stages"]}
    assert [name.split(":")[0].split(",")[0] for name in stages] == [
        "writing a random model of 0.05 billion parameters",
        "LoRA",
        "checkpoint",
        "killed; the same command to the end of the next step",
        "LoRA",
        "export with its check",
        "omnitune export",
        "omnitune chat",
    ]
    assert stages["omnitune export, with its check"] < 1.0  # Python and its libraries alone take 0.35 GiB
