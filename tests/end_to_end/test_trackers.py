"""A real run with all trackers: killed, resumed, each step once in each of them."""

import shutil
from pathlib import Path

import pytest

from tests.runs import build_here, metrics, write_records, write_small_model
from tests.unit.engine.test_tracked_lives import in_mlflow, in_tensorboard, in_wandb

pytestmark = pytest.mark.end_to_end


def test_trackers_show_what_metrics_jsonl_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "run"
    words = [
        *("model=tiny", f"model.random_from={write_small_model(tmp_path)}", *write_records(tmp_path)),
        *("tracker=[wandb,tensorboard,mlflow]", "tracker.project=tests", f"run.dir={folder}", "run.max_steps=4"),
        *("data.max_tokens=256", "data.cache=null", "checkpoint.save_every=2", "checkpoint.keep_last=0"),
        *("eval.every=3", "eval.max_new_tokens=2", "optim.warmup_ratio=0"),
    ]
    assert build_here(words).trainer.fit()
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    resumed = build_here(words)
    assert resumed.trainer.position.step == 2
    assert resumed.trainer.fit()

    lines = metrics(folder)
    wanted = {name: [(line["step"], line[name]) for line in lines if name in line] for line in lines for name in line}
    del wanted["step"]
    assert [step for step, _ in wanted["loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in wanted["eval/loss"]] == [0, 3, 4]
    assert {name: [step for step, _ in points] for name, points in in_tensorboard(folder).items()} == {
        name: [step for step, _ in points] for name, points in wanted.items()
    }
    assert in_mlflow(folder)[1] == wanted
    rows = in_wandb(folder)
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4]
    for name in ("loss", "grad_norm", "eval/loss", "eval/exact_match"):
        found = {row["_step"]: row[name] for row in rows if name in row}
        assert found == pytest.approx(dict(wanted[name]))
    assert [row["_step"] for row in rows if "eval/answers/nrows" in row] == [0, 3, 4]
