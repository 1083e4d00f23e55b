"""What three real steps of a run take: memory, and time."""

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from train.config import Options, TrackerOptions
from train.data.loader import Fetched, StepPlan
from train.engine.accelerator import close
from train.engine.build import Planned, Run, build
from train.engine.observers import peak_memory_gib
from train.errors import OmniTuneError
from train.preflight.plan import GIB, Work, heaviest_batch, work_of

_STEPS = 3


@dataclass(frozen=True)
class Taken:
    """Of the main process's device, or on a CPU of the process."""

    device: str
    peak_gib: float
    """tensors on a GPU; the whole process on a CPU"""
    reserved_gib: float | None
    """by CUDA's allocator; None on a CPU"""
    step_s: float
    """mean of the steps after the first"""
    work: Work


def measure_run(options: Options, resolved: dict[str, Any], expect: Callable[[Planned], float | None]) -> Taken | None:
    """Run three steps, the first with the largest pack; None on other processes than the main one.

    Nothing is kept of it. Raises what training would raise.

    expect: see `build`.
    """
    planned: list[Planned] = []

    def remember(known: Planned) -> float | None:
        planned.append(known)
        return expect(known)

    with TemporaryDirectory(prefix="omnitune-plan-") as folder:
        run = build(_alone(options, folder), resolved, remember)
        for observer in run.trainer.observers:
            observer.close(failed=False)
        run.trainer.train_step.engine.model.train()
        steps = _with_heaviest(run, planned[0])
        seconds = [_step(run, number, fetched) for number, fetched in enumerate(steps)]
        found = _taken(run, planned[0], seconds) if planned[0].is_main else None
        run.trainer.let_go()
        close(run.accelerator)
    return found


def _alone(options: Options, folder: str) -> Options:
    """The options without what is no step: evaluation, tracking, a resumed run."""
    changed = deepcopy(options)
    changed.run.dir, changed.run.resume = str(Path(folder) / "run"), "never"
    changed.data.eval, changed.checkpoint.keep_best = [], ""
    changed.tracker = TrackerOptions()
    return changed


def _with_heaviest(run: Run, planned: Planned) -> Iterator[Fetched]:
    """This rank's first steps, the largest pack of the epoch in place of the first."""
    if planned.plan.total_steps() < _STEPS:
        raise OmniTuneError(f"the run has fewer than {_STEPS} steps, so it cannot be measured; raise run.epochs")
    heaviest = heaviest_batch(planned.plan, planned.records)
    for number, fetched in enumerate(islice(iter(run.trainer.steps_from(0, 0)), _STEPS)):
        if not number:
            fetched.batches[0] = heaviest
        yield fetched


def _step(run: Run, number: int, fetched: Fetched) -> float:
    """Seconds of a step, in which the device is waited for."""
    began = time.perf_counter()
    run.trainer.train_step(number, fetched.batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _taken(run: Run, planned: Planned, seconds: list[float]) -> Taken:
    device, plan = planned.device, planned.plan
    step_s = sum(seconds[1:]) / len(seconds[1:])
    flops_per_s = _flops(plan) / sum(seconds[1:])
    peak = run.trainer.peak_flops
    work = work_of(plan, flops_per_s=flops_per_s, mfu=peak and flops_per_s / peak, source="measured")
    on_cuda = device.type == "cuda"
    return Taken(
        device=torch.cuda.get_device_name(device) if on_cuda else "CPU",
        peak_gib=peak_memory_gib(),
        reserved_gib=torch.cuda.max_memory_reserved(device) / GIB if on_cuda else None,
        step_s=step_s,
        work=work,
    )


def _flops(plan: StepPlan) -> float:
    """Of the steps after the first, over all ranks."""
    return sum(plan.cost(pack) for _, _, packs in islice(plan.steps(), 1, _STEPS) for pack in packs)


def as_text(taken: Taken, options: Options, gpus: int) -> str:
    """What was measured, for a terminal."""
    lines = [f"measured over {_STEPS} steps on {gpus} x {taken.device}, engine={options.engine.name}:"]
    if taken.reserved_gib is None:
        lines.append(f"  memory of the process at its peak {taken.peak_gib:14.2f} GiB")
    else:
        lines.append(f"  tensors at the peak               {taken.peak_gib:14.2f} GiB")
        lines.append(f"  reserved by the allocator         {taken.reserved_gib:14.2f} GiB")
    lines.append(f"  a step                            {taken.step_s:14.2f} s")
    return "\n".join(lines)
