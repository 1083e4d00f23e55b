"""The loop: steps of packs, evaluation, checkpoints."""

import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from train.announce import announced
from train.data.loader import Fetched
from train.engine.checkpoint import Checkpoints
from train.engine.evaluator import Evaluator
from train.engine.gain import Gain
from train.engine.observers import Observer, StepReport
from train.engine.quarantine import Quarantine
from train.engine.state import TrainedState
from train.engine.step import StepResult, TrainStep
from train.errors import CheckpointError, TrainingError
from train.export.checkpoint_reader import read_state, saved_state
from train.inference.predictions import write_predictions

log = logging.getLogger(__name__)

_NAMED = 20
"""Most records that a message names."""


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer steps done, and the next step's place in the plan.

    updates: the steps that changed the parameters; one that is not finite does not.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    updates: int = 0


@dataclass(frozen=True)
class Intervals:
    """What happens when. `eval_every` and `save_every` count optimizer steps; 0 = only at the end."""

    total_steps: int
    eval_every: int
    save_every: int
    evaluate_first: bool
    max_not_finite: int
    """Steps in a row that may be left out for a loss or gradient that is not finite."""
    one_batch: bool = False
    """Repeat the first step's packs for ever."""
    stop_after_no_gain: int = 0
    """Evaluations without a gain after which the run ends; 0 = it does not."""


@dataclass
class Trainer:
    """Runs the steps of a plan; every rank runs one of its own, alike.

    steps_from: gives this rank's batches from (epoch, step in it) on.
    plan_digest: what the packs depend on; a checkpoint of another plan would go on at another place.
    name_of: a record's file and line, by its index.
    predictions: folder of the answers of each evaluation.
    observers: empty but on the main process.
    gain: the figure by which `intervals.stop_after_no_gain` counts.
    peak_flops: operations a second that the devices of all ranks can do at most; None where it is not known.
    expected_gib: memory that the run was expected to need; None where it was not predicted.
    """

    accelerator: Accelerator
    train_step: TrainStep
    trained: TrainedState
    steps_from: Callable[[int, int], Iterable[Fetched]]
    plan_digest: str
    name_of: Callable[[int], str]
    source_names: Sequence[str]
    intervals: Intervals
    quarantine: Quarantine
    checkpoints: Checkpoints
    evaluator: Evaluator | None
    predictions: Path
    observers: Sequence[Observer]
    gain: Gain
    peak_flops: float | None = None
    expected_gib: float | None = None
    position: Position = field(default_factory=Position)
    _evaluation: dict[str, float] = field(default_factory=dict)
    _not_finite: int = 0

    def __post_init__(self) -> None:
        self._best = Gain(self.checkpoints.keep_best)

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, of this engine and number of ranks or of others."""
        state = read_state(checkpoint)
        if state["plan"] != self.plan_digest:
            run = checkpoint.parent.parent
            raise CheckpointError(
                f"'{checkpoint}' was made with other data, or with another data.*, run.seed or run.packs_per_step, so "
                "its place in the order of records is not known; put them back, or start anew in another run.dir "
                f"from the run's export, with model.path={run / 'export'} (where there is none, "
                f"`omnitune export {run}` makes it)"
            )
        with saved_state(checkpoint) as saved:
            self.trained.load(saved, state, state["position"]["updates"])
        self.quarantine.restore(state["quarantine"])
        self.position = Position(**state["position"])
        self._evaluation = state["evaluation"]
        self._best.best = state.get("best")
        self.gain.load_state_dict(state.get("gain") or self.gain.state_dict())
        log.info("resumed from %s", checkpoint)

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done, or no more are wanted, and the evaluation after the last one."""
        is_evaluated = self.evaluator is None or bool(self._evaluation)
        return self._is_last and is_evaluated

    @property
    def _is_last(self) -> bool:
        """Whether no step follows: all are done, or the evaluations have gained nothing for too long."""
        return self.position.step == self.intervals.total_steps or self._gains_nothing

    @property
    def _gains_nothing(self) -> bool:
        return 0 < self.intervals.stop_after_no_gain <= self.gain.without

    def fit(self) -> bool:
        """Train to the end of the plan, evaluating and saving on the way; False if it was asked to stop before."""
        failed = True
        try:
            done = self._run_to_the_end()
            failed = False
        finally:
            for observer in self.observers:
                observer.close(failed=failed)
        return done

    def _run_to_the_end(self) -> bool:
        self.train_step.engine.model.train()
        steps = self._fetch()  # the workers start now, and decode while the model is evaluated
        stopped = False
        if self.position.step == 0 and self.intervals.evaluate_first:
            stopped = not self.evaluate()
        if self._is_last and not self._evaluation:
            stopped = not self.evaluate()  # it was stopped in its last evaluation
            if self._evaluation:
                self._judge()
                self.save()
        for fetched, wait_s in steps if not stopped else ():
            stopped = self._train_on(fetched, wait_s)
            step, is_best = self.position.step, False
            if self._is_last or (_is_due(step, self.intervals.eval_every) and not stopped):
                stopped = not self.evaluate()
                is_best = self._judge()
            if self._is_last or stopped or is_best or _is_due(step, self.intervals.save_every):
                self.save()
            if stopped or self._is_last:
                break
        if self.position.step:
            self.checkpoints.newest()  # wait until it is written
        return not stopped

    def _judge(self) -> bool:
        """Whether the evaluation just made is the best of those after the first step, by `checkpoint.keep_best`."""
        if not self._evaluation:  # it was stopped
            return False
        self.gain.add(self._evaluation)
        if self._gains_nothing:
            log.info(
                "the last %d evaluations had no better %s than the best before them, %s: the run ends",
                self.gain.without,
                self.gain.figure,
                self.gain.best,
            )
        return self._best.add(self._evaluation)

    def save(self) -> None:
        """Begin a checkpoint; training goes on while it is written."""
        state: dict[str, Any] = {
            "step": self.position.step,
            "position": asdict(self.position),
            "plan": self.plan_digest,
            **self.trained.description(),
            "quarantine": self.quarantine.state(),
            "evaluation": self._evaluation,
            "best": self._best.best,
            "gain": self.gain.state_dict(),
            "world_size": self.accelerator.num_processes,
        }
        self.checkpoints.save(self.trained.tensors, state)

    def evaluate(self) -> bool:
        """Evaluate now, and tell the observers; False if it was asked to stop before the end."""
        if self.evaluator is None:
            return True
        with announced("evaluating the held-out records"):
            evaluation = self.evaluator.evaluate(self.train_step.engine.model)
        if evaluation is None:
            return False
        self._evaluation = evaluation.values
        self.quarantine.add(evaluation.bad)
        if evaluation.predictions and self.accelerator.is_main_process:
            write_predictions(self.predictions / f"step-{self.position.step:06d}.jsonl", evaluation.predictions)
        for observer in self.observers:
            observer.on_evaluation(self.position.step, evaluation)
        return True

    def let_go(self) -> None:
        """Free the model, the optimizer and what the engine holds, for good; every rank must call it."""
        self.accelerator.free_memory()
        del self.train_step, self.trained
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _fetch(self) -> Iterator[tuple[Fetched, float]]:
        """This rank's share of each step still to do, and the seconds it was waited for."""
        todo = self.intervals.total_steps - self.position.step
        if self._is_last:
            return iter(())
        steps = iter(self.steps_from(self.position.epoch, self.position.step_in_epoch))
        if self.intervals.one_batch:
            steps = repeat(next(steps))
        return (_timed(steps) for _ in range(todo))

    def _train_on(self, fetched: Fetched, wait_s: float) -> bool:
        """One step; returns whether some rank was asked to stop."""
        began = time.perf_counter()
        self.checkpoints.check()
        result = self.train_step(self.position.step, fetched.batches, bad_records=len(fetched.bad))
        self.position = Position(
            step=self.position.step + 1,
            epoch=fetched.epoch,
            step_in_epoch=fetched.step_in_epoch + 1,
            updates=self.position.updates + result.updated,
        )
        self._evaluation = {}
        if result.bad_records:
            self.quarantine.add(gather_object(fetched.bad))
        losses = zip(self.source_names, result.source_losses.tolist(), strict=True)
        step_s = time.perf_counter() - began + wait_s
        report = StepReport(
            step=self.position.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            tokens=result.tokens,
            supervised_tokens=result.supervised_tokens,
            step_s=step_s,
            data_wait_s=wait_s,
            device_wait_s=result.device_wait_s,
            mfu=result.flops / step_s / self.peak_flops if self.peak_flops else None,
            expected_gib=self.expected_gib,
            rates=result.rates,
            not_finite=self.position.step - self.position.updates,
            source_losses={name: loss for name, loss in losses if loss == loss},
        )
        for observer in self.observers:
            observer.on_step(report)
        self._count_not_finite(result, fetched)
        return result.stop

    def _count_not_finite(self, result: StepResult, fetched: Fetched) -> None:
        """Name the records of a step that was left out; end the run after too many such steps in a row."""
        if result.updated:
            self._not_finite = 0
            return
        self._not_finite += 1
        suspects = gather_object(result.suspects)
        what = "the loss of" if suspects else "the gradient, though not the loss, of"
        records = suspects or gather_object([record for batch in fetched.batches for record in batch.records])
        names = ", ".join(self.name_of(record) for record in records[:_NAMED])
        more = f" and {len(records) - _NAMED} more" if len(records) > _NAMED else ""
        log.warning("step %d left out: %s %s%s is not finite", self.position.step, what, names, more)
        if self._not_finite > self.intervals.max_not_finite:
            raise TrainingError(
                f"{self._not_finite} steps in a row had a loss or gradient that is not finite, more than "
                f"run.max_not_finite allows; the last one with {names}{more}. Lower the learning rate, or look at "
                "these records; the run goes on from its newest checkpoint"
            )


def _timed(steps: Iterator[Fetched]) -> tuple[Fetched, float]:
    began = time.perf_counter()
    return next(steps), time.perf_counter() - began


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
