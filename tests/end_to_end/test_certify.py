"""A run of two ranks ends with its certificate, which is made in one process after them."""

import json
from pathlib import Path

import pytest

from tests.runs import succeed, write_records, write_small_model

pytestmark = pytest.mark.end_to_end


def test_a_run_ends_with_its_certificate(tmp_path: Path) -> None:
    words = [
        *("+recipe=lora", f"model.random_from={write_small_model(tmp_path)}", *write_records(tmp_path)),
        *("tracker=none", "data.eval=[]", "data.max_tokens=256", "data.cache=null", "run.certify=true"),
        *("run.max_steps=2", "run.packs_per_step=2", f"run.dir={tmp_path / 'run'}"),
    ]
    done = succeed(words, processes=2)
    lines = {
        line["name"]: line["passed"] for line in json.loads((tmp_path / "run/certificate.json").read_text())["lines"]
    }
    assert [name for name, passed in lines.items() if passed] == list(lines)[:6]
    assert lines["export in vLLM"] is None
    assert "frozen = base" in done.stdout
