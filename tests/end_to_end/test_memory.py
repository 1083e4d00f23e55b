"""A run says what memory it expects, writes it beside what it took, and says what to change where memory runs out."""

from pathlib import Path

import pytest

from tests.runs import launch, metrics, write_records

pytestmark = pytest.mark.end_to_end


def test_a_run_out_of_memory_says_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILURE", "memory")
    words = [*write_records(tmp_path, train=120), "data.eval=[]", "engine=none", "tracker=none"]
    words += ["run.predict_memory=true", "data.max_tokens=8192", "run.packs_per_step=1"]
    done = launch([*words, "run.epochs=9", f"run.dir={tmp_path}/run"], script="tests/end_to_end/failing_rank.py")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "expected memory: " in done.stderr
    said = done.stderr[done.stderr.index("error: memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB.)") :]
    for words_to_add in (
        "run.activation_checkpointing=full",
        "optim.name=adamw_8bit",
        "lora=qlora run.activation_checkpointing=full",
    ):
        assert f"  {words_to_add}\n" in said
    assert "GPU 0 has none" not in said
    [step] = metrics(tmp_path / "run")
    # one pack an epoch: half a GiB of tensors, and as much of a process that libraries let grow a little
    assert step["memory/expected_gib"] == pytest.approx(step["memory/peak_gib"], abs=0.3)
