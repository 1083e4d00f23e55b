"""A run's folder as a killed, a resumed and a running run leave it."""

import fcntl
from pathlib import Path

import numpy as np
import pytest

from tests.unit.report.builders import evaluation, step, write_run
from train.errors import OmniTuneError
from train.report.reading import read_metrics, read_run
from train.report.verdict import Level, State, checks, state_of, tiles


def test_steps_and_evaluations_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 0, "eval/loss": 3}\n{"step": 1, "loss": 2, "loss/a": 5}\n{"step": 2, "loss": null, "lr/llm": 1}\n'
        '{"step": 2, "eval/loss": 1, "eval/f1": null}\n\xff\n[1]\n{"step": "x"}\n{"step": 3, "lo'
    )
    metrics = read_metrics(file)
    assert metrics.steps.tolist() == [1, 2]
    np.testing.assert_equal(metrics.columns["loss"], [2, np.nan])
    np.testing.assert_equal(metrics.columns["loss/a"], [5, np.nan])
    np.testing.assert_equal(metrics.columns["lr/llm"], [np.nan, 1])
    assert metrics.evaluations == {0: {"eval/loss": 3}, 2: {"eval/loss": 1}}
    assert metrics.last_step == 2


def test_a_folder_that_is_no_runs(tmp_path: Path) -> None:
    with pytest.raises(OmniTuneError, match=r"has no config.yaml, so it is not the folder of a run"):
        read_run(tmp_path)
    with pytest.raises(OmniTuneError, match="is not there"):
        read_run(tmp_path / "none")


def test_answers_beyond_the_checkpoint_of_a_killed_run_do_not_count(tmp_path: Path) -> None:
    lines = [evaluation(0, 3), step(1, 2)]
    run = write_run(tmp_path / "run", lines, {0: [("a", "b")], 500: [("a", "a")]})
    assert read_run(run).answered() == [0]


def test_a_run_that_holds_its_lock_goes_on(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [step(1, 2), step(2, 1)], total_steps=2))
    assert state_of(run) is State.finished
    with run.folder.lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert state_of(run) is State.running
    assert state_of(run) is State.finished


def test_a_killed_run_says_how_to_go_on(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [step(1, 2), step(2, 1)], total_steps=9))
    assert state_of(run) is State.unfinished
    first = checks(run, state_of(run))[0]
    assert first.level is Level.bad
    resume = f"to resume, run the same command with run.dir={run.folder.path}"
    assert first.text == f"The run was killed or stopped after step 2 of 9; {resume}."


def said(run: Path, level: Level) -> str:
    files = read_run(run)
    return " ".join(check.text for check in checks(files, state_of(files)) if check.level is level)


def test_what_deserves_a_look_is_said(tmp_path: Path) -> None:
    waits = {"time/step_s": 1.0, "time/data_wait_s": 0.25}
    lines = [evaluation(0, 3, cut_answers=1), *(step(n, 2.0, not_finite=n // 10, **waits) for n in range(1, 21))]
    lines += [evaluation(10, 1), evaluation(20, 1.5, cut_answers=0.25)]
    run = write_run(tmp_path / "run", lines, total_steps=20)
    (run / "quarantine.jsonl").write_text('{"source": "a.jsonl", "line": 3, "reason": "a.jsonl:3: no"}\n')
    notes, faults = said(run, Level.note), said(run, Level.bad)
    assert "The held-out loss was lowest (1 after step 10) and rose to 1.5" in notes
    assert "25 % of the time went to waiting for data" in notes
    assert "25.0 % of the answers were cut short" in notes
    assert "1 record(s) could not be used" in notes
    assert "2 step(s) were left out" in faults
    assert "The training loss did not fall: 2, then 2." in faults


def test_the_export_and_the_certificate_are_judged(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [step(1, 2)], total_steps=1)
    (run / "export").mkdir()
    (run / "export" / "export.json").write_text('{"step": 1, "ok": false}')
    line = '{"name": "packed = one by one", "figure": 1, "tolerance": 0.1, "passed": false, "why": "a leak"}'
    (run / "certificate.json").write_text(f'{{"lines": [{line}]}}')
    faults = said(run, Level.bad)
    assert "The check of the export failed" in faults
    assert "The certificate failed: packed = one by one." in faults
    (run / "export" / "export.json").write_text('{"step": 1, "ok": true}')
    (run / "certificate.json").write_text(f'{{"lines": [{line.replace("false", "null")}]}}')
    assert said(run, Level.bad) == ""
    assert "The certificate holds" in said(run, Level.good)


def test_tiles_have_the_first_and_the_last_figure(tmp_path: Path) -> None:
    lines = [evaluation(0, 3, exact_match=0.25), step(1, 2, **{"time/step_s": 90.0, "tokens": 50}), step(2, 1)]
    run = read_run(write_run(tmp_path / "run", [*lines, evaluation(2, 0.5, exact_match=0.75)], total_steps=2))
    assert [(tile.name, tile.value, tile.before) for tile in tiles(run)] == [
        ("steps", "2", "of 2"),
        ("training loss", "1", "at first 2"),
        ("held-out loss", "0.5", "at first 3"),
        ("exact match", "0.75", "at first 0.25"),
        ("time of the steps", "90.0 s", "50 tokens"),
    ]
