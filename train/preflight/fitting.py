"""Which settings of a run fit into how much memory: other engines, checkpointing, adapters, optimizers and limits."""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from train.checks.chosen import tuned_modules
from train.config import CheckpointingOptions, Engine, OptimizerName, Options
from train.data.loader import StepPlan
from train.data.record_set import RecordSet
from train.engine.build_data import flops_of, limits_of, make_plan
from train.families.family import Family
from train.preflight.memory import Measured, measure_step
from train.preflight.plan import GIB, GpuMemory, gpu_memory, heaviest_batch
from train.schema import KINDS, Batch

SIZES = (16, 24, 48, 80, 141)
"""GB of GPUs for which the table says what fits."""

_LIMITS = ("max_tokens", "max_patches", "max_frames")
"""Options of data that bound a pack, in the order of a row of lengths."""


@dataclass(frozen=True)
class Way:
    """A way to run it, in the words of the command line."""

    lora: str
    engine: Engine
    checkpointing: str
    optimizer: OptimizerName
    limits: tuple[int, ...]
    """of each of _LIMITS"""

    @classmethod
    def of(cls, options: Options) -> "Way":
        """What the options say."""
        kept = options.run.activation_checkpointing
        return cls(
            lora="none" if not options.lora.modules else "qlora" if options.lora.load_in_4bit else "lora",
            engine=options.engine.name,
            checkpointing=kept.llm if kept.llm == kept.towers else f"{{llm: {kept.llm}, towers: {kept.towers}}}",
            optimizer=options.optim.name,
            limits=limits_of(options).row(),
        )

    def words(self) -> list[str]:
        """Overrides to paste."""
        return [
            f"lora={self.lora}",
            f"engine={self.engine}",
            f"run.activation_checkpointing={self.checkpointing}",
            f"optim.name={self.optimizer}",
            *(f"data.{name}={limit}" for name, limit in zip(_LIMITS, self.limits, strict=True)),
        ]

    def applied(self, options: Options) -> Options:
        """The options changed to this way."""
        changed, now = deepcopy(options), Way.of(options)
        if self.lora != now.lora:
            changed.lora.modules = [] if self.lora == "none" else ["llm"]
            changed.lora.load_in_4bit = self.lora == "qlora"
        changed.engine.name = self.engine
        if self.checkpointing != now.checkpointing:
            changed.run.activation_checkpointing = CheckpointingOptions(self.checkpointing, self.checkpointing)
        changed.optim.name = self.optimizer
        return _with_limits(self.limits, changed)


@dataclass(frozen=True)
class Choice:
    """A way, and what it takes."""

    way: Way
    changes: tuple[str, ...]
    """overrides that make the run's own options this way"""
    memory: GpuMemory
    work: float
    """beside full tuning without checkpointing"""


def choices(
    options: Options,
    family: Family,
    folder: Path,
    plan: StepPlan,
    records: RecordSet,
    gpus: int,
    *,
    on_cuda: bool = True,
) -> list[Choice]:
    """What the run would take in other ways too, the least memory last.

    folder: the model folder. plan, records: of data.train.
    """
    own = Way.of(options)
    batches = {own.limits: heaviest_batch(plan, records)}
    if (halved := _halved(own.limits, plan)) != own.limits:
        flops = flops_of(options, family, folder)
        smaller = heaviest_batch(make_plan(_with_limits(halved, options), flops, records, plan.measured), records)
        if _row(smaller) != _row(batches[own.limits]):  # packs may be no larger than half of the limits anyway
            batches[halved] = smaller
    measured: dict[Way, Measured] = {}
    work = {lora: _work(options, family, folder, batches[own.limits], lora) for lora in _loras(options, family)}
    made = []
    for way in _ways(options, family, gpus, list(batches), on_cuda=on_cuda):
        case = _as_measured(way)
        if case not in measured:
            measured[case] = measure_step(case.applied(options), family, folder, batches[way.limits])
        changes = tuple(word for word, now in zip(way.words(), own.words(), strict=True) if word != now)
        again = 1.0 if way.checkpointing == "none" else 4 / 3
        memory = gpu_memory(way.applied(options), measured[case], gpus)
        made.append(Choice(way, changes, memory, again * work[way.lora] / work.get("none", work[own.lora])))
    return sorted(made, key=lambda choice: -choice.memory.total)


def _ways(
    options: Options, family: Family, gpus: int, limits: Sequence[tuple[int, ...]], *, on_cuda: bool
) -> Iterator[Way]:
    own = options.engine.name
    simple = own if not own.zero_stage else Engine.none if gpus == 1 else Engine.ddp
    sharding = [Engine.zero2, Engine.zero2_offload] if gpus == 1 else [Engine.zero2, Engine.zero3, Engine.zero3_offload]
    engines = [simple, *(engine for engine in sharding if on_cuda or not engine.offloads)]
    every = product(_loras(options, family), engines, ("none", "full"), OptimizerName, limits)
    for lora, engine, checkpointing, optimizer, of_pack in every:
        if engine.zero_stage and (optimizer is not OptimizerName.adamw or lora not in ("none", Way.of(options).lora)):
            continue
        if lora == "qlora" and engine.zero_stage == 3:
            continue
        if lora == "none" or optimizer is OptimizerName.adamw:  # adapters have few moments
            yield Way(lora, engine, checkpointing, optimizer, of_pack)


def _loras(options: Options, family: Family) -> list[str]:
    fits = "llm" in family.modules and "llm" in tuned_modules(options)
    return ["none", "lora", "qlora"] if fits else [Way.of(options).lora]


def _as_measured(way: Way) -> Way:
    """The way that takes as many bytes on one device before moments and shards are counted."""
    return Way(
        lora="none" if way.lora == "none" else "lora",
        engine=Engine.zero2 if way.engine.zero_stage else Engine.none,
        checkpointing=way.checkpointing,
        optimizer=OptimizerName.adamw,
        limits=way.limits,
    )


def _work(options: Options, family: Family, folder: Path, batch: Batch, lora: str) -> float:
    """Floating-point operations of a pack."""
    own = Way.of(options)
    changed = Way(lora, own.engine, own.checkpointing, own.optimizer, own.limits).applied(options)
    return float(flops_of(changed, family, folder).of(np.array([_row(batch)]))[0])


def _row(batch: Batch) -> list[int]:
    """Its lengths: tokens, then units of each medium."""
    return [len(batch.input_ids), *(batch.units(kind) for kind in KINDS)]


def _halved(limits: tuple[int, ...], plan: StepPlan) -> tuple[int, ...]:
    """Half of each limit, where no record is larger."""
    most = plan.measured.lengths.max(axis=0).tolist()
    return tuple(limit // 2 if limit // 2 >= largest else limit for limit, largest in zip(limits, most, strict=True))


def _with_limits(limits: tuple[int, ...], options: Options) -> Options:
    changed = deepcopy(options)
    for name, limit in zip(_LIMITS, limits, strict=True):
        setattr(changed.data, name, limit)
    return changed


def table_text(options: Options, found: Iterable[Choice], sizes: Sequence[float]) -> str:
    """Which choices fit in which GPUs; GPUs of so many GB have so many 10^9 bytes."""
    own = Way.of(options)
    head = "  ".join(f"{size:g}" for size in sizes)
    lines = [f"what fits, by GB of a GPU ({head}); work beside full tuning without checkpointing:"]
    for choice in found:
        fits = "  ".join(
            ("x" if choice.memory.total * GIB <= size * 1e9 else "-").center(len(f"{size:g}")) for size in sizes
        )
        words = choice.way.words()
        shown = words[: -len(_LIMITS)] + [word for word in words[-len(_LIMITS) :] if word not in own.words()]
        lines.append(f"  {choice.memory.total:6.1f} GiB  {fits}  {choice.work:4.2f}  {' '.join(shown)}")
    return "\n".join(lines)
