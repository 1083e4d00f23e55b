"""What a run will take: GPU memory by part, host memory, disk, steps, work and time; and which settings fit."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import numpy as np

from train.config import CheckpointingOptions, Engine, OptimizerName, Options, Precision
from train.data.loader import StepPlan
from train.data.record_set import RecordSet, Watching
from train.data.workers import Results
from train.engine.build_data import flops_of
from train.errors import OmniTuneError
from train.preflight.memory import Measured, measure_step
from train.preflight.prepare import Prepared
from train.schema import KINDS, Batch

GIB = 2**30

_CONTEXT = 0.6 + 0.22
"""GiB of CUDA's context and of kernels' temporaries. Not measured here."""

_FRAGMENTATION = 0.07
"""Share of the tensors' bytes that the allocator loses to fragmentation: 5 to 10 %. Not measured here."""

_MOMENTS = {OptimizerName.adamw: 8.0, OptimizerName.adamw_8bit: 2 * (1 + 4 / 256), OptimizerName.muon: 8.0}
"""Bytes of an optimizer's moments, for each trained value: two fp32 ones, or codes of a byte and a scale for each 256.
Muon has one moment for matrices; how many of the values those are is not counted here, so it is taken for AdamW."""

_MASTER = 4
"""Bytes of an fp32 master weight."""

_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a value in 4 bit, its scales included: a byte for 64 values, and 4 bytes for 256 of these scales."""

_GATHERED = 10**9
"""Values that ZeRO-3 keeps gathered at most (DeepSpeed's stage3_max_live_parameters)."""

SIZES = (16, 24, 48, 80, 141)
"""GB of GPUs for which the table says what fits."""


@dataclass(frozen=True)
class GpuMemory:
    """GiB on each GPU, by part."""

    weights: float
    optimizer: float
    """fp32 master weights, where they are kept apart, and moments"""
    gradients: float
    activations: float
    """with the loss; what lives at the peak of a micro-batch beside the other parts"""
    update: float
    """what DeepSpeed's update holds for a moment: fp32 gradients of the largest group of parameters"""

    @property
    def tensors(self) -> float:
        """The most that tensors take at a time."""
        return self.weights + self.optimizer + self.gradients + max(self.activations, self.update)

    @property
    def total(self) -> float:
        """With CUDA's context, kernels' temporaries and fragmentation."""
        return self.tensors * (1 + _FRAGMENTATION) + _CONTEXT


def gpu_memory(options: Options, measured: Measured, gpus: int) -> GpuMemory:
    """The parts on each of `gpus` GPUs, as the engine shares them out."""
    engine = options.engine.name
    stage, shards = engine.zero_stage, gpus
    weights = float(measured.weights)
    if options.lora.load_in_4bit:
        stored = 2 if options.run.precision is Precision.bf16 else 4
        weights -= measured.quantizable * (stored - _NF4)
    moments = _MOMENTS[options.optim.name] * measured.trained
    optimizer = (_MASTER * measured.trained + moments) / shards if stage else measured.masters + moments
    activations = float(measured.activations)
    if stage == 3:
        gathered = min(weights, 2 * _GATHERED)
        weights = gathered if engine.offloads else weights / shards + gathered
    return GpuMemory(
        weights=weights / GIB,
        optimizer=0.0 if engine.offloads else optimizer / GIB,
        gradients=measured.gradients / (shards if stage >= 2 else 1) / GIB,
        activations=activations / GIB,
        update=_MASTER * measured.largest_group / shards / GIB if stage and not engine.offloads else 0.0,
    )


@dataclass(frozen=True)
class Work:
    """Steps, tokens, floating-point operations and time of the whole run."""

    steps: int
    tokens: int
    flops: float
    """without the head's, which lengths do not tell"""
    hours: float
    mfu: float
    mfu_is: str
    """given or assumed"""


def work_of(plan: StepPlan, *, gpus: int, peak_tflops: float, mfu: float | None, assumed: float = 0.3) -> Work:
    """What the run computes; packs of later epochs are taken to be like those of the first."""
    packs = plan.epoch(0)
    share = plan.total_steps() / plan.steps_in(0)
    flops = share * sum(map(plan.cost, packs))
    used = assumed if mfu is None else mfu
    return Work(
        steps=plan.total_steps(),
        tokens=int(share * sum(int(plan.measured.lengths[pack, 0].sum()) for pack in packs)),
        flops=flops,
        hours=flops / (used * gpus * peak_tflops * 1e12) / 3600,
        mfu=used,
        mfu_is="assumed" if mfu is None else "given",
    )


def heaviest_batch(plan: StepPlan, records: RecordSet) -> Batch:
    """The decoded pack of the first epoch that fills its limits the most."""
    limits = np.array(plan.limits.row())
    packs = sorted(plan.epoch(0), key=lambda pack: -float((plan.measured.lengths[pack].sum(axis=0) / limits).sum()))
    results = Results(partial(_batch, records), lambda done: packs[done:1], records.given_up, records.workers)
    for batch in results:
        if batch.records:
            return batch
    raise OmniTuneError("the largest pack holds no record that can be decoded; `omnitune doctor` names what is wrong")


def _batch(records: RecordSet, pack: Sequence[int], watch: Watching) -> Batch:
    return records.batch(pack, watch)[0]


@dataclass(frozen=True)
class Choice:
    """A way to run it."""

    overrides: str
    memory: GpuMemory
    work: float
    """beside that of full tuning without checkpointing"""


def choices(prepared: Prepared, batch: Batch, gpus: int) -> list[Choice]:
    """What other engines, checkpointing and adapters would take, the least memory last."""
    lora = [f"lora={form}" for form in ("none", "lora", "qlora") if form == "none" or "llm" in prepared.family.modules]
    engines = ["none", "zero2", "zero2_offload"] if gpus == 1 else ["ddp", "zero2", "zero3", "zero3_offload"]
    ways = [(form, engine, on) for form in lora for engine in engines for on in (False, True)]
    ways = [way for way in ways if way[0] == "lora=none" or way[1] in ("none", "ddp")]
    cases = {(form != "lora=none", engine not in ("none", "ddp"), on) for form, engine, on in ways}
    measured = {
        case: measure_step(_variant(prepared.options, *case), prepared.family, prepared.folder, batch)
        for case in sorted(cases)
    }
    whole = None
    made = []
    for form, engine, on in ways:
        case = form != "lora=none", engine not in ("none", "ddp"), on
        options = _variant(prepared.options, *case)
        options.engine.name = Engine(engine)
        options.lora.load_in_4bit = form == "lora=qlora"
        row = np.array([[len(batch.input_ids), *(batch.units(kind) for kind in KINDS)]])
        flops = float(flops_of(options, prepared.family, prepared.folder).of(row)[0])
        whole = whole or flops
        again = 4 / 3 if on else 1.0
        words = f"{form} engine={engine} run.activation_checkpointing={'full' if on else 'none'}"
        made.append(Choice(words, gpu_memory(options, measured[case], gpus), flops / whole * again))
    return sorted(made, key=lambda choice: -choice.memory.total)


def _variant(options: Options, lora: bool, deepspeed: bool, checkpointing: bool) -> Options:
    """The options with adapters or without, of one engine of each kind."""
    changed = deepcopy(options)
    changed.lora.modules = ["llm"] if lora else []
    changed.engine.name = Engine.zero2 if deepspeed else Engine.none
    every = "full" if checkpointing else "none"
    changed.run.activation_checkpointing = CheckpointingOptions(every, every)
    return changed


def as_text(prepared: Prepared, measured: Measured, memory: GpuMemory, work: Work, gpus: int) -> str:
    """The plan of the run itself, for a terminal."""
    options, trained = prepared.options, measured.trained
    kept = options.checkpoint.keep_last + 1
    checkpoint = (_MASTER + _MOMENTS[options.optim.name]) * trained / 1e9
    host = checkpoint * (1 + (16 / 12 if options.engine.name.offloads else 0))
    parts = [
        ("weights", memory.weights),
        ("master weights and moments", memory.optimizer),
        ("gradients", memory.gradients),
        ("activations and loss, largest pack", memory.activations),
        ("DeepSpeed's update, in place of activations", memory.update),
        ("tensors at the peak", memory.tensors),
        ("context, kernels, fragmentation (assumed)", memory.total - memory.tensors),
        ("in all", memory.total),
    ]
    lines = [f"GPU memory on each of {gpus}, engine={options.engine.name}, computed, GiB:"]
    lines += [f"  {name:44} {size:7.1f}" for name, size in parts if size or name == "in all"]
    lines += [
        f"host memory: {host:.1f} GB for the copy of a checkpoint"
        + (" and the optimizer" if options.engine.name.offloads else ""),
        f"disk: {kept} checkpoints of {checkpoint:.1f} GB (keep_last and the one that is written), and the export",
        f"work: {work.steps:,} steps, {work.tokens:,} tokens, {work.flops:.3g} FLOPs; "
        f"{work.hours:.1f} hours at an MFU of {100 * work.mfu:g} % ({work.mfu_is})",
    ]
    return "\n".join(lines)


def table_text(found: Sequence[Choice], sizes: Sequence[float]) -> str:
    """Which choices fit in which GPUs; GPUs of so many GB have so many 10^9 bytes."""
    head = "  ".join(f"{size:g}" for size in sizes)
    lines = [f"what fits, by GB of a GPU ({head}); work beside full tuning without checkpointing:"]
    for choice in found:
        fits = "  ".join(
            ("x" if choice.memory.total * GIB <= size * 1e9 else "-").center(len(f"{size:g}")) for size in sizes
        )
        lines.append(f"  {choice.memory.total:6.1f} GiB  {fits}  {choice.work:4.2f}  {choice.overrides}")
    return "\n".join(lines)


def plan_run(prepared: Prepared) -> tuple[StepPlan, Batch, Measured]:
    """The steps of the run, its heaviest pack, and what a step of that takes."""
    plan = prepared.plan()
    batch = heaviest_batch(plan, prepared.sets["data.train"])
    return plan, batch, measure_step(prepared.options, prepared.family, prepared.folder, batch)
