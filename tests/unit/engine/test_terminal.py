"""What a run prints, in a terminal and in a file."""

import logging
import re
from collections.abc import Callable, Iterator

import pytest

from tests.unit.engine.test_observers import report
from train.engine.evaluator import Evaluation
from train.engine.observers import Progress
from train.engine.terminal import Terminal

FIGURES = {"records": 2.0, "loss": 1.25, "exact_match": 0.5}


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Logs as a run does; gives what was printed since."""
    log, handler = logging.getLogger("train"), Terminal()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lambda: capsys.readouterr().err
    log.removeHandler(handler)
    log.setLevel(level)


def test_messages_have_time_and_level(printed: Callable[[], str]) -> None:
    logging.getLogger("train.engine.build").warning("the disk is nearly full")
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING the disk is nearly full\n", printed())


def test_an_evaluation_is_a_table_and_says_what_it_is(printed: Callable[[], str]) -> None:
    progress = Progress(4, 0)
    progress.on_evaluation(3, Evaluation({}, {"speech": {**FIGURES, "loss": 12.5}}, FIGURES, [], []))
    title, *rows = printed().splitlines()[-4:]
    assert title.endswith("INFO    held-out records, after step 3:")
    assert rows == [
        "type    records     loss  exact_match",
        "speech        2  12.5000       0.5000",
        "all           2   1.2500       0.5000",
    ]


def test_progress_in_a_file_is_lines_with_the_time_left(printed: Callable[[], str]) -> None:
    progress = Progress(4, 2)
    for step in (3, 4):
        progress.on_step(report(step))
    progress.close(failed=False)
    lines = printed().split("\n")[:-1]
    assert lines[0].endswith("step 2 of 4 00:00 passed, ? left")
    figures = "train_loss=2.000, tokens_per_s=200, data_wait_s=0.10, device_wait_s=0.30"
    assert re.search(rf"INFO    step 4 of 4 00:00 passed, 00:00 left, {figures}$", lines[-1])
    assert len(lines) == 2
    assert not any("\r" in line for line in lines)


def test_no_column_for_what_was_not_counted() -> None:
    """Without answers, nothing counts the records."""
    evaluation = Evaluation({}, {}, {"records": 0.0, "loss": 1.0}, [], [])
    assert evaluation.table().split() == ["type", "loss", "all", "1.0000"]
