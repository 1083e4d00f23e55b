"""A run that gains nothing ends, is finished, and ends at the same step after a kill."""

import shutil
from pathlib import Path

import pytest

from tests.end_to_end.test_keep_best import evaluations, steps_kept, words
from tests.runs import build_here
from train.errors import ConfigError

pytestmark = pytest.mark.end_to_end

NO_GAIN = 2


def first_end(losses: dict[int, float]) -> int:
    """The step whose evaluation is the second in a row that is not below all before it."""
    best, without = float("inf"), 0
    for step, loss in sorted(losses.items()):
        best, without = (loss, 0) if loss < best else (best, without + 1)
        if without == NO_GAIN:
            return step
    raise AssertionError("the loss does not rise long enough")


def test_it_ends_when_nothing_is_gained_also_after_a_kill(tmp_path: Path) -> None:
    without_best = [*words(tmp_path), "checkpoint.keep_best=", "checkpoint.keep_last=0", "checkpoint.save_every=1"]
    build_here(without_best).trainer.fit()
    whole = evaluations(tmp_path / "run")
    end = first_end(whole)
    assert 2 < end < max(whole)

    command = [*without_best, f"run.dir={tmp_path / 'early'}", f"run.stop_after_no_gain={NO_GAIN}"]
    assert build_here(command).trainer.fit()
    assert evaluations(tmp_path / "early") == {step: loss for step, loss in whole.items() if step <= end}
    assert steps_kept(tmp_path / "early") == list(range(1, end + 1))

    shutil.rmtree(tmp_path / "early" / "checkpoints" / f"step-{end:06d}")  # killed between the two evaluations
    resumed = build_here(command)
    assert resumed.trainer.position.step == end - 1
    assert not resumed.trainer.is_finished
    assert resumed.trainer.fit()
    assert steps_kept(tmp_path / "early") == list(range(1, end + 1))

    again = build_here(command)
    assert again.was_finished
    assert again.trainer.fit()
    assert max(evaluations(tmp_path / "early")) == end

    more = build_here([*command, "run.stop_after_no_gain=5"])  # it may go on where it was
    assert more.trainer.fit()
    assert max(evaluations(tmp_path / "early")) > end


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.eval=[]"], "run.stop_after_no_gain is 2, but data.eval is empty"),
        (["eval.every=0"], "run.stop_after_no_gain is 2, but eval.every is 0"),
        (["run.gain_figure=eval/los"], r"run.gain_figure: .* no figure 'eval/los' \(did you mean eval/loss\?\)"),
        (["run.stop_after_no_gain=0", "run.gain_figure=eval/loss"], "set run.stop_after_no_gain too"),
    ],
)
def test_what_cannot_be_counted_is_refused(more: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        build_here([*words(tmp_path), "checkpoint.keep_best=", "run.stop_after_no_gain=2", *more])
