"""The best checkpoint is saved when it is best; what is asked for and cannot be is said; observers end with the run."""

from pathlib import Path

import pytest

from tests.runs import build_here, metrics, write_records, write_small_model
from train.engine.evaluator import Evaluation
from train.engine.observers import StepReport
from train.errors import ConfigError

pytestmark = pytest.mark.end_to_end

STEPS = 8


def words(folder: Path, out: str = "run") -> list[str]:
    """A rate at which the loss falls at first, and then rises: the best step is neither the first nor the last."""
    if not (folder / "model").exists():
        write_small_model(folder)
    return [
        *write_records(folder, train=48),
        *(f"model.random_from={folder / 'model'}", f"run.dir={folder / out}", "eval.generate=false"),
        *(f"run.max_steps={STEPS}", "run.epochs=9", "run.packs_per_step=1", "data.max_tokens=256", "run.threads=1"),
        *("optim.schedule=constant", "optim.warmup_ratio=0", "modules.lr.llm=3e-2", "run.precision=fp32"),
        *("checkpoint.save_every=0", "eval.every=1", "checkpoint.keep_best=eval/loss"),
    ]


def steps_kept(run: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").iterdir())


def evaluations(run: Path) -> dict[int, float]:
    """The held-out loss after each step."""
    return {line["step"]: line["eval/loss"] for line in metrics(run) if "eval/loss" in line and line["step"]}


def test_the_best_is_saved_though_no_save_was_due(tmp_path: Path) -> None:
    build_here([*words(tmp_path), "checkpoint.keep_last=1"]).trainer.fit()
    found = evaluations(tmp_path / "run")
    best = min(found, key=lambda step: found[step])
    assert 1 < best < STEPS
    assert steps_kept(tmp_path / "run") == [best, STEPS]


def test_a_resumed_run_remembers_the_best(tmp_path: Path) -> None:
    straight = [*words(tmp_path), "checkpoint.keep_last=0"]
    build_here(straight).trainer.fit()
    found = evaluations(tmp_path / "run")
    improved = [step for step in found if all(found[step] < found[before] for before in range(1, step))]
    assert steps_kept(tmp_path / "run") == sorted({*improved, STEPS})
    first = tmp_path / f"run/checkpoints/step-{max(improved):06d}"
    build_here([*words(tmp_path, "again"), "checkpoint.keep_last=0", f"run.resume={first}"]).trainer.fit()
    assert steps_kept(tmp_path / "again") == [STEPS]


@pytest.mark.parametrize(
    ("wanted", "more", "said"),
    [
        ("eval/los", [], r"no figure 'eval/los' \(did you mean eval/loss\?\); it gives eval/loss"),
        ("eval/exact_match", [], "no figure 'eval/exact_match'"),
        ("eval/wer", ["eval.generate=true"], "it gives eval/loss, eval/exact_match, eval/exact_match/"),
        ("eval/loss/eval", [], "no figure 'eval/loss/eval'"),
    ],
)
def test_a_figure_that_is_not_evaluated_is_refused(wanted: str, more: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        build_here([*words(tmp_path), f"checkpoint.keep_best={wanted}", *more])


def test_the_figures_are_those_that_an_evaluation_gives(tmp_path: Path) -> None:
    plain, *_ = write_records(tmp_path)
    file = tmp_path / "eval.jsonl"
    two = f"data.eval=[{{path: {file}, root: data/sample}}, {{path: {file}, root: data/sample}}]"
    some = "eval.metrics=[f1,wer/speech,exact_match]"
    run = build_here([*words(tmp_path), plain, two, "eval.generate=true", some, "eval.max_new_tokens=2"])
    evaluator = run.trainer.evaluator
    assert evaluator
    assert {"eval/loss/eval", "eval/loss/eval-2"} < set(evaluator.figures())
    values = evaluator.evaluate(run.trainer.train_step.engine.model).values
    assert sorted(values) == sorted(evaluator.figures())


def test_steps_that_the_epochs_do_not_hold_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = build_here([*words(tmp_path), "run.max_steps=500", "run.epochs=1"])
    total = run.trainer.intervals.total_steps
    assert total < 500
    assert f"run.max_steps is 500, and the run ends after {total} steps" in caplog.text
    caplog.clear()
    build_here(words(tmp_path, "other"))
    assert "run.max_steps" not in caplog.text


class Watcher:
    """Notes its end; fails at the second step where it is told to."""

    def __init__(self, *, fails: bool = False):
        self.fails = fails
        self.ends: list[bool] = []

    def on_step(self, report: StepReport) -> None:
        if self.fails and report.step == 2:
            raise OSError(28, "No space left on device")

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        pass

    def close(self, *, failed: bool) -> None:
        self.ends.append(failed)


@pytest.mark.parametrize("fails", [False, True])
def test_observers_are_closed_however_a_run_ends(fails: bool, tmp_path: Path) -> None:
    run = build_here([*words(tmp_path), "run.max_steps=3"])
    watchers = [Watcher(fails=fails), Watcher()]
    run.trainer.observers = watchers
    if fails:
        with pytest.raises(OSError, match="No space left"):
            run.trainer.fit()
    else:
        assert run.trainer.fit()
    assert [watcher.ends for watcher in watchers] == [[fails], [fails]]
