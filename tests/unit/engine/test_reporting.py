"""The page that a run writes: never its end, never much of its time."""

import os
from pathlib import Path

import pytest

from tests.unit.engine.test_observers import evaluation as found
from tests.unit.engine.test_observers import report
from tests.unit.report.builders import evaluation, step, write_run
from train.config import Options
from train.engine.reporting import Reporter


def reporter(run: Path, total_steps: int = 1) -> Reporter:
    return Reporter(run, Options(), step=0, total_steps=total_steps)


@pytest.mark.parametrize(
    ("total_steps", "failed", "state"), [(1, False, "finished"), (2, False, "unfinished"), (2, True, "failed")]
)
def test_the_last_page_says_how_it_ended(total_steps: int, failed: bool, state: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [step(1, 2), evaluation(1, 1)])
    watching = reporter(run, total_steps)
    watching.on_evaluation(0, found({}))
    assert 'data-state="running"' in (run / "report.html").read_text()
    watching.on_step(report(1))
    watching.close(failed=failed)
    assert f'data-state="{state}"' in (run / "report.html").read_text()


def test_a_fault_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reporter(tmp_path / "none").close(failed=False)
    assert "report.html could not be written" in caplog.text
    assert f"`omnitune report {tmp_path / 'none'}` writes it" in caplog.text


def test_a_page_that_would_take_too_much_of_the_time_waits(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [step(1, 2), evaluation(1, 1)])
    watching = reporter(run)
    watching.on_evaluation(0, found({}))
    page = run / "report.html"
    os.utime(page, (0, 0))
    watching.on_evaluation(1, found({}))  # at once after the first
    assert page.stat().st_mtime == 0
    watching._ended -= 21 * watching._cost_s  # as if so long had passed since
    watching.on_evaluation(2, found({}))
    assert page.stat().st_mtime > 0
