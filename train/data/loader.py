"""The steps of a run: planned ahead, decoded in worker processes, at hand when they are needed."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from train.data.augment import Augmenter
from train.data.plan import Limits, Speeds, assign, plan_epoch
from train.data.record_set import BadNote, Measured, RecordSet
from train.data.watchdog import Watchdog
from train.data.workers import Results
from train.errors import OmniTuneError
from train.schema import Batch, Changes


@dataclass
class Fetched:
    """What a rank computes in one step: its packs, and the records that turned out unusable."""

    batches: list[Batch]
    bad: list[BadNote] = field(default_factory=list)
    epoch: int = 0
    step_in_epoch: int = 0

    def pin_memory(self) -> "Fetched":
        """The same in page-locked memory (what DataLoader calls)."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


class StepPlan:
    """The training run as a sequence of steps, each a list of packs; the same on every rank.

    costs: predicted work of each record (records,), by which packs are shared out; by default its lengths' sum.
    speeds: at which clips run, in each epoch; None = at their own.
    """

    def __init__(
        self,
        measured: Measured,
        weights: Sequence[float],
        limits: Limits,
        *,
        packs_per_step: int,
        seed: int,
        epochs: int,
        max_steps: int | None,
        costs: np.ndarray | None = None,
        speeds: Speeds | None = None,
    ):
        self.speeds = speeds
        self.costs = measured.lengths.sum(axis=1) if costs is None else costs
        self.measured, self.weights, self.limits = measured, list(weights), limits
        self.packs_per_step, self.seed, self.epochs, self.max_steps = packs_per_step, seed, epochs, max_steps
        self._planned: tuple[int, list[list[int]]] = (-1, [])
        self._drawn: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        if not any(len(records) for records in measured.by_source()):
            raise OmniTuneError("no usable record is left in data.train; quarantine.jsonl says why")
        for source, (records, weight) in enumerate(zip(measured.by_source(), weights, strict=True)):
            if len(records) and not round(weight * len(records)):
                raise OmniTuneError(
                    f"data.train[{source}].weight is {weight}, so that an epoch takes none of its {len(records)} "
                    "records; raise it, or leave the source out"
                )

    def digest(self) -> str:
        """A short hash of all that the order of steps depends on."""
        state = hashlib.blake2b(self.measured.lengths.tobytes(), digest_size=16)
        state.update(repr((self.weights, self.limits, self.packs_per_step, self.seed)).encode())
        if self.speeds:
            state.update(self.speeds.lengths.tobytes() + repr((self.speeds.factors, self.speeds.drawn_from)).encode())
        return state.hexdigest()

    def epoch(self, epoch: int) -> list[list[int]]:
        """The packs of an epoch."""
        if self._planned[0] != epoch:
            packs = plan_epoch(
                self.speeds.lengths_in(epoch) if self.speeds else self.measured.lengths,
                self.measured.by_source(),
                self.weights,
                self.limits,
                seed=self.seed,
                epoch=epoch,
            )
            self._planned = (epoch, packs)
        return self._planned[1]

    def steps_in(self, epoch: int) -> int:
        """Optimizer steps of an epoch; its last one may hold fewer packs."""
        return -(-len(self.epoch(epoch)) // self.packs_per_step)

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        total = 0
        for epoch in range(self.epochs):
            total += self.steps_in(epoch)
            if self.max_steps is not None and total >= self.max_steps:
                return self.max_steps
        return total

    def steps(self, epoch: int = 0, step_in_epoch: int = 0) -> Iterator[tuple[int, int, list[list[int]]]]:
        """(epoch, step in it, packs) from there on to the end of the last epoch."""
        for current in range(epoch, self.epochs):
            packs = self.epoch(current)
            for step in range(step_in_epoch, self.steps_in(current)):
                yield current, step, packs[step * self.packs_per_step : (step + 1) * self.packs_per_step]
            step_in_epoch = 0

    def speeds_of(self, epoch: int, packs: Sequence[Sequence[int]]) -> dict[int, float]:
        """The speed of each record of the packs; empty where all run at their own."""
        if not self.speeds:
            return {}
        if self._drawn[0] != epoch:
            self._drawn = (epoch, self.speeds.drawn(epoch))
        return {record: self.speeds.factors[self._drawn[1][record]] for pack in packs for record in pack}

    def cost(self, pack: Sequence[int]) -> float:
        """Predicted work of a pack."""
        return float(self.costs[list(pack)].sum())


class _RankSteps:
    """The packs of one rank, step by step."""

    def __init__(self, plan: StepPlan, rank: int, world_size: int, epoch: int, step_in_epoch: int):
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.epoch, self.step_in_epoch = epoch, step_in_epoch

    def __iter__(self) -> Iterator["_Item"]:
        for epoch, step, packs in self.plan.steps(self.epoch, self.step_in_epoch):
            ranks = assign([self.plan.cost(pack) for pack in packs], self.world_size)
            mine = [packs[index] for index in ranks[self.rank]]
            places = max(len(packs_of) for packs_of in ranks)
            yield epoch, step, mine + [[]] * (places - len(mine)), self.plan.speeds_of(epoch, mine)


_Item = tuple[int, int, list[list[int]], dict[int, float]]
"""Epoch, step in it, packs, and the speeds of their records."""


def _decode(records: RecordSet, augmenter: Augmenter | None, item: _Item, watch: Watchdog) -> Fetched:
    epoch, step, packs, speeds = item
    fetched = Fetched([], epoch=epoch, step_in_epoch=step)

    def changes(record: int) -> Changes | None:
        source, _ = records.locate(record)
        return augmenter.changes(source, record, epoch, speeds.get(record, 1.0)) if augmenter else None

    for pack in packs:
        batch, bad = records.batch(pack, watch, changes)
        fetched.batches.append(batch)
        fetched.bad += bad
    return fetched


class StepLoader:
    """The rank's batches of every step from (epoch, step_in_epoch) on, decoded ahead in the records' workers.

    augmenter: changes the media; None = they are used as they are.
    """

    def __init__(
        self,
        plan: StepPlan,
        records: RecordSet,
        *,
        rank: int,
        world_size: int,
        epoch: int = 0,
        step_in_epoch: int = 0,
        pin_memory: bool = False,
        augmenter: Augmenter | None = None,
    ):
        self.augmenter = augmenter
        self.plan, self.records, self.rank, self.world_size = plan, records, rank, world_size
        self.position = (epoch, step_in_epoch)
        self.pin_memory = pin_memory

    def __iter__(self) -> Iterator[Fetched]:
        job = partial(_decode, self.records, self.augmenter)
        workers = self.records.workers
        return self._from(iter(Results(job, self._rest, self.records.given_up, workers, pin_memory=self.pin_memory)))

    def _from(self, steps: Iterator[Fetched]) -> Iterator[Fetched]:
        for fetched in steps:
            self.position = (fetched.epoch, fetched.step_in_epoch + 1)
            yield fetched

    def _rest(self, _: int) -> _RankSteps:
        return _RankSteps(self.plan, self.rank, self.world_size, *self.position)
