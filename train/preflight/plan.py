"""What a run will take: GPU memory by part, host memory, disk, steps, work and time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from train.config import OptimizerName, Options, Precision
from train.data.loader import StepPlan
from train.data.record_set import RecordSet, Watching
from train.data.workers import Results
from train.errors import OmniTuneError
from train.preflight.memory import Measured
from train.schema import Batch

GIB = 2**30

_CONTEXT = 0.6 + 0.22
"""GiB of CUDA's context and of kernels' temporaries. Not measured here."""

_FRAGMENTATION = 0.07
"""Share of the tensors' bytes that the allocator loses to fragmentation: 5 to 10 %. Not measured here."""

_MASTER = 4
"""Bytes of an fp32 master weight."""

_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a value in 4 bit, its scales included: a byte for 64 values, and 4 bytes for 256 of these scales."""

_GATHERED = 10**9
"""Values that ZeRO-3 keeps gathered at most (DeepSpeed's stage3_max_live_parameters)."""


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


def moments_bytes(options: Options, measured: Measured) -> float:
    """Of the optimizer's moments: two fp32 ones of each trained value, or codes of a byte and a scale for each 256;
    Muon has one fp32 moment of its matrices.
    """
    if options.optim.name is OptimizerName.adamw_8bit:
        return 2 * (1 + 4 / 256) * measured.trained
    return 8.0 * measured.trained - (4 * measured.by_muon if options.optim.name is OptimizerName.muon else 0)


def gpu_memory(options: Options, measured: Measured, gpus: int) -> GpuMemory:
    """The parts on each of `gpus` GPUs, as the engine shares them out."""
    engine = options.engine.name
    stage, shards = engine.zero_stage, gpus
    weights = float(measured.weights)
    if options.lora.load_in_4bit:
        stored = 2 if options.run.precision is Precision.bf16 else 4
        weights -= measured.quantizable * (stored - _NF4)
    moments = moments_bytes(options, measured)
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
    mfu: float | None
    """None where the device's peak is not known"""
    source: str
    """of the time: given, assumed or measured"""


def work_of(plan: StepPlan, *, flops_per_s: float, mfu: float | None, source: str) -> Work:
    """What the run computes; packs of later epochs are taken to be like those of the first.

    flops_per_s: of all devices. mfu, source: see `Work`.
    """
    packs = plan.epoch(0)
    share = plan.total_steps() / plan.steps_in(0)
    flops = share * sum(map(plan.cost, packs))
    return Work(
        steps=plan.total_steps(),
        tokens=int(share * sum(int(plan.measured.lengths[pack, 0].sum()) for pack in packs)),
        flops=flops,
        hours=flops / flops_per_s / 3600,
        mfu=mfu,
        source=source,
    )


def heaviest_batch(plan: StepPlan, records: RecordSet) -> Batch:
    """The decoded pack of the first epoch that fills its limits the most."""
    limits = np.array(plan.limits.row())
    packs = sorted(plan.epoch(0), key=lambda pack: -float((plan.measured.lengths[pack].sum(axis=0) / limits).sum()))
    workers = replace(records.workers, count=min(records.workers.count, 1))
    results = Results(partial(_batch, records), lambda done: packs[done:1], records.given_up, workers)
    for batch in results:
        if batch.records:
            return batch
    raise OmniTuneError("the largest pack holds no record that can be decoded; `omnitune doctor` names what is wrong")


def _batch(records: RecordSet, pack: Sequence[int], watch: Watching) -> Batch:
    return records.batch(pack, watch)[0]


def as_text(options: Options, measured: Measured, memory: GpuMemory, work: Work, gpus: int) -> str:
    """The plan of the run itself, for a terminal."""
    kept = options.checkpoint.keep_last + 1
    checkpoint = (_MASTER * measured.trained + moments_bytes(options, measured)) / 1e9
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
        work_text(work),
    ]
    return "\n".join(lines)


def work_text(work: Work) -> str:
    """Steps, work and time, for a terminal."""
    time = f"{work.hours:.3g} hours" if work.hours >= 0.1 else f"{3600 * work.hours:.3g} seconds"
    said = f"work: {work.steps:,} steps, {work.tokens:,} tokens, {work.flops:.3g} FLOPs; {time}"
    return said + (f", {work.source}" if work.mfu is None else f" at an MFU of {100 * work.mfu:.3g} % ({work.source})")
