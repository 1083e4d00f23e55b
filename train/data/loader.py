"""From record files to the batches of each step: measured once, planned ahead, decoded in workers."""

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from train.data.collate import collate
from train.data.lengths import LengthCache
from train.data.plan import Limits, assign, plan_epoch
from train.data.readers import open_source
from train.data.records import parse_record
from train.errors import BadRecord, OmniTuneError
from train.schema import Batch, Record


@dataclass(frozen=True)
class SourceSpec:
    """A file of records, the folder of its media, and how often an epoch takes each record."""

    name: str
    path: str
    root: str
    weight: float = 1.0
    format: str = "auto"


@dataclass(frozen=True)
class BadNote:
    """A line of quarantine.jsonl."""

    source: str
    line: int
    reason: str


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


@dataclass
class Measured:
    """Lengths (records, 3) of tokens, patches and mel frames (0 tokens: not usable), types, source ends."""

    lengths: np.ndarray
    types: list[str]
    ends: np.ndarray

    def by_source(self) -> list[np.ndarray]:
        """Indices of each source's usable records."""
        starts = np.concatenate([[0], self.ends[:-1]])
        usable = self.lengths[:, 0] > 0
        return [np.flatnonzero(usable[start:end]) + start for start, end in zip(starts, self.ends, strict=True)]


class RecordSet:
    """The records of several sources under one index.

    processor: has `measure`, `encode`, `prompt` and `reference` of a record.
    """

    def __init__(self, specs: Sequence[SourceSpec], processor: Any, *, max_tokens: int, too_long: str):
        self.specs = list(specs)
        self.processor = processor
        self._fit = {"max_tokens": max_tokens, "too_long": too_long}
        self._sources = [open_source(spec.path, spec.format) for spec in specs]
        self._ends = np.cumsum([len(source) for source in self._sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """(source, row in the source) of a record."""
        source = int(np.searchsorted(self._ends, index, side="right"))
        return source, index - (int(self._ends[source - 1]) if source else 0)

    def record(self, index: int) -> Record:
        """The checked record; raises BadRecord."""
        source, row = self.locate(index)
        spec, opened = self.specs[source], self._sources[source]
        return parse_record(opened[row], root=Path(spec.root), file=spec.path, line=opened.line(row))

    def note(self, index: int, error: BadRecord) -> BadNote:
        """The quarantine line of a record that cannot be used."""
        source, row = self.locate(index)
        return BadNote(self.specs[source].path, self._sources[source].line(row), str(error))

    def measure(self, cache: LengthCache | None = None) -> tuple[Measured, list[BadNote]]:
        """Lengths of every usable record, by headers alone, and notes on the others.

        What the cache knows is not measured again, unless it could not be used then.
        """
        lengths = np.zeros((len(self), 3), dtype=np.int32)
        types = [""] * len(self)
        bad: list[BadNote] = []
        for spec, source, end in zip(self.specs, self._sources, self._ends.tolist(), strict=True):
            part = slice(end - len(source), end)
            held = cache.load(spec.path, spec.root) if cache else None
            if held:
                lengths[part], types[part] = held
            todo = [index for index in range(part.start, end) if not lengths[index, 0]]
            bad += self._measure(todo, lengths, types)
            if cache and todo:
                cache.save(spec.path, spec.root, lengths[part], types[part])
        return Measured(lengths, types, self._ends), bad

    def _measure(self, todo: Sequence[int], lengths: np.ndarray, types: list[str]) -> list[BadNote]:
        bad = []
        for index in todo:
            try:
                record = self.record(index)
                size = self.processor.measure(record, **self._fit)
            except BadRecord as error:
                bad.append(self.note(index, error))
            else:
                lengths[index] = size.tokens, size.patches, size.frames
                types[index] = record.type
        return bad

    def batch(self, pack: Sequence[int]) -> tuple[Batch, list[BadNote]]:
        """A pack's records decoded and laid end to end; those that fail leave their place empty."""
        samples, sources, records, bad = [], [], [], []
        for index in pack:
            try:
                sample = self.processor.encode(self.record(index), **self._fit)
            except BadRecord as error:
                bad.append(self.note(index, error))
            else:
                samples.append(sample)
                sources.append(self.locate(index)[0])
                records.append(index)
        return collate(samples, sources, records), bad


class StepPlan:
    """The training run as a sequence of steps, each a list of packs; the same on every rank.

    costs: predicted work of each record (records,), by which packs are shared out; by default its lengths' sum.
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
    ):
        self.costs = measured.lengths.sum(axis=1) if costs is None else costs
        self.measured, self.weights, self.limits = measured, list(weights), limits
        self.packs_per_step, self.seed, self.epochs, self.max_steps = packs_per_step, seed, epochs, max_steps
        self._planned: tuple[int, list[list[int]]] = (-1, [])
        if not any(len(records) for records in measured.by_source()):
            raise OmniTuneError("no usable record is left in data.train; quarantine.jsonl says why")

    def epoch(self, epoch: int) -> list[list[int]]:
        """The packs of an epoch."""
        if self._planned[0] != epoch:
            packs = plan_epoch(
                self.measured.lengths,
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

    def cost(self, pack: Sequence[int]) -> float:
        """Predicted work of a pack."""
        return float(self.costs[list(pack)].sum())


class _RankSteps:
    """What DataLoader draws from: the packs of one rank, step by step."""

    def __init__(self, plan: StepPlan, rank: int, world_size: int, epoch: int, step_in_epoch: int):
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.epoch, self.step_in_epoch = epoch, step_in_epoch

    def __iter__(self) -> Iterator[tuple[int, int, list[list[int]]]]:
        for epoch, step, packs in self.plan.steps(self.epoch, self.step_in_epoch):
            ranks = assign([self.plan.cost(pack) for pack in packs], self.world_size)
            mine = [packs[index] for index in ranks[self.rank]]
            places = max(len(packs_of) for packs_of in ranks)
            yield epoch, step, mine + [[]] * (places - len(mine))


class _Decode(Dataset):
    def __init__(self, records: RecordSet):
        self.records = records

    def __getitem__(self, item: tuple[int, int, list[list[int]]]) -> Fetched:
        epoch, step, packs = item
        fetched = Fetched([], epoch=epoch, step_in_epoch=step)
        for pack in packs:
            batch, bad = self.records.batch(pack)
            fetched.batches.append(batch)
            fetched.bad += bad
        return fetched


def load_steps(
    plan: StepPlan,
    records: RecordSet,
    *,
    rank: int,
    world_size: int,
    epoch: int = 0,
    step_in_epoch: int = 0,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> DataLoader:
    """The rank's batches of every step from (epoch, step_in_epoch) on, decoded ahead in `workers` processes.

    Workers come from a server process: forked from this one, with its threads, they sometimes hang for ever.
    """
    multiprocessing.set_forkserver_preload(["torch", "transformers", "train.data.processor"])
    return DataLoader(
        _Decode(records),
        batch_size=None,
        sampler=_RankSteps(plan, rank, world_size, epoch, step_in_epoch),  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=pin_memory,
    )
