"""W&B: whatever is wrong with it, it warns, and the run goes on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from tests.unit.engine.test_observers import evaluation, report
from train.config import TrackerOptions
from train.engine.tracking.chosen import trackings
from train.engine.tracking.tracker import TrackedRun, Tracking
from train.run_folder import RunFolder

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def wandb_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no settings and no service of another test."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wandb.teardown()
    yield
    wandb.teardown()


def start(folder: Path, **options: Any) -> Tracking:
    [tracking] = trackings(TrackedRun("test", RunFolder(folder), TrackerOptions(wandb=True, **options), {"run": {}}))
    return tracking


def track(folder: Path, project: str = "tests") -> None:
    """All that a run asks of its tracker."""
    folder.mkdir(exist_ok=True)
    tracker = start(folder, project=project)
    tracker.on_evaluation(0, evaluation({"eval/loss": 2.0}))
    tracker.on_step(report(1))
    tracker.close(failed=False)


def recorded(folder: Path) -> list[Path]:
    """What W&B kept of a run that it will upload later."""
    return list((folder / "wandb").glob("offline-run-*/*.wandb"))


def test_without_a_key_it_records_offline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    track(tmp_path / "run")
    assert len(recorded(tmp_path / "run")) == 1
    assert not [entry for entry in caplog.records if entry.levelname == "WARNING"]


def test_a_key_and_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("train.engine.tracking.to_wandb._PATIENCE_S", 3)
    track(tmp_path / "run")
    assert len(recorded(tmp_path / "run")) == 1
    assert "records offline" in caplog.text


def test_online_without_a_key_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    track(tmp_path / "run")
    assert len(recorded(tmp_path / "run")) == 1
    assert "no API key" in caplog.text


@pytest.mark.parametrize("held", [b"", b" \n", b"a/b", b"\xff\xfe", b"x" * 500])
def test_a_broken_run_id_is_drawn_anew(held: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "run" / "wandb" / "run_id"
    file.parent.mkdir(parents=True)
    file.write_bytes(held)
    track(tmp_path / "run")
    [kept] = recorded(tmp_path / "run")
    assert kept.parent.name.endswith(file.read_text())
    assert "run_id" in caplog.text


def test_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    file = tmp_path / "run" / "wandb" / "run_id"
    track(tmp_path / "run")
    first = file.read_text()
    track(tmp_path / "run")
    assert file.read_text() == first


def test_an_unwritable_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("a file where the folder should be")
    track(tmp_path / "run")
    assert "goes on untracked" in caplog.text


def test_an_unknown_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("WANDB_MODE", "banana")
    track(tmp_path / "run")
    assert "goes on untracked" in caplog.text
    assert "banana" in caplog.text


def test_a_project_that_wandb_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    track(tmp_path / "run", project="team/project")
    assert "goes on untracked" in caplog.text
    assert "team/project" in caplog.text


def test_a_service_that_dies_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    tracker = start(folder)
    wandb.teardown(exit_code=1)
    for step in range(1, 4):
        tracker.on_step(report(step))
    tracker.close(failed=True)
    assert caplog.text.count("goes on untracked") <= 1
