"""Work that takes long says so; short work is silent."""

import logging
import time

import pytest

from train.announce import announced


def test_long_work_is_announced_while_it_runs_and_timed_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with announced("loading the weights", silence_s=0.05):
        time.sleep(0.2)
        assert caplog.messages == ["loading the weights ..."]
    assert caplog.messages == ["loading the weights ...", "loading the weights: done in 0 s"]


def test_short_work_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with announced("loading the weights", silence_s=0.2):
        pass
    time.sleep(0.3)
    assert not caplog.messages


@announced("loading the weights", silence_s=0.05)
def fail() -> None:
    time.sleep(0.1)
    raise KeyError


def test_work_that_fails_is_not_said_to_be_done(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(KeyError):
        fail()
    assert caplog.messages == ["loading the weights ..."]
