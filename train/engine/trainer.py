"""The loop: steps of packs, evaluation, checkpoints."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from train.data.loader import Fetched
from train.engine.checkpoint import Checkpoints
from train.engine.evaluator import Evaluator
from train.engine.metrics import Observer, StepReport
from train.engine.quarantine import Quarantine
from train.engine.step import TrainStep


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer steps done, and the next step's place in the plan."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0


@dataclass(frozen=True)
class Rhythm:
    """What happens when. `eval_every` and `save_every` count optimizer steps; 0 = only at the end."""

    total_steps: int
    eval_every: int
    save_every: int
    evaluate_first: bool
    one_batch: bool = False
    """Repeat the first step's packs for ever."""


@dataclass
class Trainer:
    """Runs the steps of a plan; every rank runs one of its own, alike.

    steps_from: gives this rank's batches from (epoch, step in it) on.
    observers: empty but on the main process.
    """

    accelerator: Accelerator
    train_step: TrainStep
    steps_from: Callable[[int, int], Iterable[Fetched]]
    source_names: Sequence[str]
    rhythm: Rhythm
    quarantine: Quarantine
    checkpoints: Checkpoints
    evaluator: Evaluator | None
    observers: Sequence[Observer]
    position: Position = field(default_factory=Position)

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint."""
        state = self.checkpoints.load(checkpoint)
        self.position = Position(**{name: state[name] for name in asdict(self.position)})

    def fit(self) -> None:
        """Train to the end of the plan, evaluating and saving on the way."""
        self.train_step.model.train()
        steps = self._fetch()  # the workers start now, and decode while the model is evaluated
        if self.position.step == 0 and self.rhythm.evaluate_first:
            self.evaluate()
        for fetched, wait_s in steps:
            self._train_on(fetched, wait_s)
            step, last = self.position.step, self.position.step == self.rhythm.total_steps
            if last or _is_due(step, self.rhythm.eval_every):
                self.evaluate()
            if last or _is_due(step, self.rhythm.save_every):
                self.checkpoints.save(self.train_step.model, asdict(self.position))
        for observer in self.observers:
            observer.close()

    def evaluate(self) -> None:
        """Evaluate now, and tell the observers."""
        if self.evaluator is None:
            return
        values, bad = self.evaluator.evaluate(self.train_step.model)
        self.quarantine.add(gather_object(bad))
        for observer in self.observers:
            observer.on_evaluation(self.position.step, values)

    def _fetch(self) -> Iterator[tuple[Fetched, float]]:
        """This rank's share of each step still to do, and the seconds it was waited for."""
        todo = self.rhythm.total_steps - self.position.step
        if todo <= 0:
            return iter(())
        steps = iter(self.steps_from(self.position.epoch, self.position.step_in_epoch))
        if self.rhythm.one_batch:
            steps = repeat(next(steps))
        return (_timed(steps) for _ in range(todo))

    def _train_on(self, fetched: Fetched, wait_s: float) -> None:
        began = time.perf_counter()
        result = self.train_step(self.position.step, fetched.batches, bad_records=len(fetched.bad))
        self.position = Position(self.position.step + 1, fetched.epoch, fetched.step_in_epoch + 1)
        if result.bad_records:
            self.quarantine.add(gather_object(fetched.bad))
        losses = zip(self.source_names, result.source_losses.tolist(), strict=True)
        report = StepReport(
            step=self.position.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            tokens=result.tokens,
            supervised_tokens=result.supervised_tokens,
            step_s=time.perf_counter() - began + wait_s,
            data_wait_s=wait_s,
            rates=result.rates,
            source_losses={name: loss for name, loss in losses if loss == loss},
        )
        for observer in self.observers:
            observer.on_step(report)


def _timed(steps: Iterator[Fetched]) -> tuple[Fetched, float]:
    began = time.perf_counter()
    return next(steps), time.perf_counter() - began


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
