"""What TensorBoard, MLflow and W&B keep of a run that was killed and resumed: each step once, in one curve.

Their own files are read back: event files, a sqlite store, the log of W&B's offline mode.
"""

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import wandb
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from tests.unit.data.builders import png, wav
from tests.unit.engine.test_observers import evaluation, report
from train.config import TrackerOptions
from train.engine.evaluator import Evaluation, Prediction
from train.engine.observers import MetricsFile, Observer
from train.engine.tracking.chosen import trackings
from train.engine.tracking.tracker import TrackedRun
from train.run_folder import RunFolder
from train.schema import Part, Record, Turn

TRACKERS = ("wandb", "tensorboard", "mlflow")


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wandb.teardown()
    yield
    wandb.teardown()


def begin(folder: Path, *, since: int, tracker: str, record: Record | None = None) -> list[Observer]:
    """The observers of a life of a run, as `build` makes them; `since`: the step that it is resumed from, or -1."""
    folder.mkdir(exist_ok=True)
    metrics = MetricsFile(folder / "metrics.jsonl", since)
    options = TrackerOptions(**{tracker: True}, project="tests", tags=["small"])
    config = {"run": {"seed": 0, "name": "x"}, "data": {"eval": []}}
    tracked = TrackedRun("test", RunFolder(folder), options, config, since, lambda file, line: record)
    return [metrics, *trackings(tracked)]


def live(observers: list[Observer], first: int, last: int, *, loss: float) -> None:
    for step in range(first, last + 1):
        for observer in observers:
            observer.on_step(report(step, loss))


def evaluate(observers: list[Observer], step: int, found: Evaluation) -> None:
    for observer in observers:
        observer.on_evaluation(step, found)


def end(observers: list[Observer], *, failed: bool = False) -> None:
    for observer in observers:
        observer.close(failed=failed)


def killed_and_resumed(folder: Path, tracker: str) -> None:
    """Steps 0 (an evaluation) to 5, killed; resumed from step 3, with other losses, to step 6."""
    first = begin(folder, since=-1, tracker=tracker)
    evaluate(first, 0, evaluation({"eval/loss": 4.0}))
    live(first, 1, 5, loss=2.0)
    evaluate(first, 5, evaluation({"eval/loss": 2.0}))
    end(first, failed=True)
    second = begin(folder, since=3, tracker=tracker)
    live(second, 4, 5, loss=1.0)
    evaluate(second, 5, evaluation({"eval/loss": 1.0}))
    live(second, 6, 6, loss=1.0)
    end(second)


LOSSES = [(1, 2.0), (2, 2.0), (3, 2.0), (4, 1.0), (5, 1.0), (6, 1.0)]
EVALUATIONS = [(0, 4.0), (5, 1.0)]
NAMES = set(report(1).to_dict()) - {"step"} | {"eval/loss"}


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def in_mlflow(folder: Path) -> tuple[Any, dict[str, list[tuple[int, float]]]]:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tests")
    assert experiment
    [run] = client.search_runs([experiment.experiment_id])  # those that are not deleted
    history = {
        name: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
    }
    return run, history


def wandb_records(folder: Path) -> list[Any]:
    """The records of every folder that `wandb sync wandb/offline-run-*` uploads: a LevelDB log after 7 bytes."""
    wandb.teardown()  # W&B's process may still be writing, and ends with this
    found = []
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        data, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last part
                found.append(wandb_internal_pb2.Record.FromString(whole))
                whole = b""
    return found


def in_wandb(folder: Path) -> list[dict[str, Any]]:
    """The rows of the history, each a step."""
    histories = [record.history for record in wandb_records(folder) if record.WhichOneof("record_type") == "history"]
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
        for history in histories
    ]


def test_tensorboard_shows_one_curve(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path / "run", "tensorboard")
    found = in_tensorboard(tmp_path / "run")
    assert found["loss"] == LOSSES
    assert found["eval/loss"] == EVALUATIONS
    assert set(found) == NAMES


def test_tensorboard_reads_on_after_a_file_that_was_cut(tmp_path: Path) -> None:
    """A killed process's last record may be there in half."""
    folder = tmp_path / "run"
    first = begin(folder, since=-1, tracker="tensorboard")
    live(first, 1, 3, loss=2.0)
    end(first)
    [file] = (folder / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    second = begin(folder, since=2, tracker="tensorboard")
    live(second, 3, 4, loss=1.0)
    end(second)
    assert in_tensorboard(folder)["loss"] == [(1, 2.0), (2, 2.0), (3, 1.0), (4, 1.0)]


def test_mlflow_shows_one_curve(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path / "run", "mlflow")
    run, found = in_mlflow(tmp_path / "run")
    assert found["loss"] == LOSSES
    assert found["eval/loss"] == EVALUATIONS
    assert set(found) == NAMES
    assert run.data.params == {"run.seed": "0", "run.name": "x", "data.eval": "[]"}
    assert run.info.run_name == "test"
    assert run.info.status == "FINISHED"
    assert "small" in run.data.tags


def test_a_run_that_goes_on_where_it_was_left_goes_on_in_mlflow(tmp_path: Path) -> None:
    """What the killed process had not sent yet is sent from metrics.jsonl."""
    folder = tmp_path / "run"
    first = begin(folder, since=-1, tracker="mlflow")
    live(first, 1, 3, loss=2.0)
    for observer in first[1:]:
        observer._tracker._pending.clear()  # type: ignore[attr-defined]  # killed before it was sent
    end(first, failed=True)
    before = (folder / "mlflow" / "run_id").read_text()
    second = begin(folder, since=3, tracker="mlflow")
    live(second, 4, 6, loss=1.0)
    end(second)
    assert (folder / "mlflow" / "run_id").read_text() == before
    assert in_mlflow(folder)[1]["loss"] == LOSSES


def test_what_is_killed_after_a_while_is_in_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.engine.tracking.to_mlflow._PATIENCE_S", 0.0)
    observers = begin(tmp_path / "run", since=-1, tracker="mlflow")
    live(observers, 1, 2, loss=2.0)  # and never closed
    with sqlite3.connect(tmp_path / "run" / "mlflow" / "mlflow.db") as store:
        steps = store.execute("select step from metrics where key = 'loss' order by step").fetchall()
    assert steps == [(1,), (2,)]


def test_wandb_uploads_each_step_once(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path / "run", "wandb")
    rows = in_wandb(tmp_path / "run")
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    assert [(row["_step"], row["loss"]) for row in rows if "loss" in row] == LOSSES
    assert [(row["_step"], row["eval/loss"]) for row in rows if "eval/loss" in row] == EVALUATIONS
    assert set().union(*rows) >= NAMES
    ids = {record.run.run_id for record in wandb_records(tmp_path / "run") if record.HasField("run")}
    assert ids == {(tmp_path / "run" / "wandb" / "run_id").read_text()}
    assert len(list((tmp_path / "run" / "wandb" / "replaced").iterdir())) == 1


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_run_that_begins_anew_forgets_what_was_there(tracker: str, tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint evaluates and takes step 1 a second time."""
    folder = tmp_path / "run"
    for loss in (2.0, 1.0):
        observers = begin(folder, since=-1, tracker=tracker)
        evaluate(observers, 0, evaluation({"eval/loss": loss}))
        live(observers, 1, 1, loss=loss)
        end(observers)
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 1]
    if tracker == "wandb":
        assert [row["_step"] for row in in_wandb(folder)] == [0, 1]
    else:
        found = in_tensorboard(folder) if tracker == "tensorboard" else in_mlflow(folder)[1]
        assert (found["eval/loss"], found["loss"]) == ([(0, 1.0)], [(1, 1.0)])


def test_wandb_gets_tables_of_answers_with_images_and_clips(tmp_path: Path) -> None:
    """Also those of evaluations before the resume, since the folder to be synced is the newest alone."""
    (tmp_path / "a.png").write_bytes(png(3, 4))
    parts = Part("image", str(tmp_path / "a.png")), Part("audio", wav(0.1)), Part("text", "What?")
    record = Record((Turn("user", parts), Turn("assistant", (Part("text", "red"),))), "r.jsonl", 1)
    said = Prediction("r.jsonl", 1, "vqa", "user: <image><audio>What?", "red", "blue")
    found = Evaluation({"eval/loss": 1.0}, {}, {}, [said], [])
    folder = tmp_path / "run"
    (folder / "predictions").mkdir(parents=True)
    (folder / "predictions" / "step-000000.jsonl").write_text(json.dumps(asdict(said)) + "\n")
    first = begin(folder, since=-1, tracker="wandb", record=record)
    evaluate(first, 0, found)
    end(first)
    second = begin(folder, since=0, tracker="wandb", record=record)
    evaluate(second, 1, found)
    end(second)

    assert [row["_step"] for row in in_wandb(folder) if "eval/answers/nrows" in row] == [0, 1]
    artifacts = [record.artifact for record in wandb_records(folder) if record.HasField("artifact")]
    assert len(artifacts) == 2
    for artifact in artifacts:
        files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
        table = json.loads(files["eval/answers.table.json"].read_text())
        assert table["columns"] == ["record", "type", "prompt", "reference", "answer", "image", "audio"]
        [[*texts, image, audio]] = table["data"]
        assert texts == ["r.jsonl:1", "vqa", "user: <image><audio>What?", "red", "blue"]
        assert (image["_type"], image["width"], image["height"]) == ("image-file", 3, 4)
        assert audio["_type"] == "audio-file"
        assert files[image["path"]].read_bytes() == png(3, 4)
        assert files[audio["path"]].stat().st_size > 3200  # 0.1 s of 16 bit at 16 kHz


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_that_fails_ends_no_run(tracker: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / tracker).write_text("a file where the folder should be")
    observers = begin(folder, since=-1, tracker=tracker)
    live(observers, 1, 2, loss=2.0)
    end(observers)
    assert caplog.text.count("goes on untracked") == 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_store_that_goes_away_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.engine.tracking.to_mlflow._PATIENCE_S", 0.0)
    observers = begin(tmp_path / "run", since=-1, tracker="mlflow")
    with sqlite3.connect(tmp_path / "run" / "mlflow" / "mlflow.db") as store:
        store.execute("drop table metrics")
    live(observers, 1, 3, loss=2.0)
    end(observers)
    assert caplog.text.count("MLflow failed") == 1
