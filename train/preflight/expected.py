"""What a run says of memory: at its start what it expects to need, and what to change where memory runs out."""

import gc
import logging
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch

from train.announce import announced
from train.config import Engine, Options
from train.engine.build import Planned
from train.engine.observers import peak_memory_gib
from train.errors import OmniTuneError, TrainingError
from train.export.base_folder import available_memory
from train.preflight.fitting import Choice, choices
from train.preflight.memory import measure_step
from train.preflight.plan import GIB, GpuMemory, gpu_memory, heaviest_batch

log = logging.getLogger(__name__)

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)

_NAMED, _WITH_ADAPTERS = 4, 2
"""Most settings that a message names, without adapters and with them."""


class Expectation:
    """What a run is expected to need; the run is built and trained within `explained`.

    Called with what is planned, before the weights are loaded, it says it on the main process.
    """

    def __init__(self, options: Options):
        self.options = options
        self._planned: Planned | None = None

    def __call__(self, planned: Planned) -> float | None:
        """GiB of memory at the peak, as `memory/peak_gib` counts it; None where it is not predicted."""
        self._planned = planned
        on_cuda = planned.device.type == "cuda"
        wanted = self.options.run.predict_memory
        if not planned.is_main or not (on_cuda if wanted is None else wanted):
            return None
        try:
            with announced("predicting the memory that the run needs (run.predict_memory=false leaves it out)"):
                memory = self._predicted(planned)
        except Exception as failure:  # which is no reason not to train
            log.warning("the memory that the run needs cannot be predicted: %s", failure)
            return None
        there = _memory_gib(planned.device)
        total = memory.total if on_cuda else memory.tensors + peak_memory_gib()
        of = f" of {there:.1f}" if there else ""
        log.info("expected memory%s: %.1f GiB%s; %s", " of the GPU" * on_cuda, total, of, _parts(memory))
        if there and total > there:
            log.warning("that is more than there is; `omnitune plan --table` with the same options names what fits")
        return memory.tensors + (0.0 if on_cuda else peak_memory_gib())

    def _predicted(self, planned: Planned) -> GpuMemory:
        options = _on_device(self.options, planned.device)
        batch = heaviest_batch(planned.plan, planned.records)
        measured = measure_step(options, planned.family, planned.base, batch)
        return gpu_memory(options, measured, planned.ranks)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Around building and training: where memory runs out, TrainingError says what to change."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            evaluating = any(frame.name == "evaluate" for frame in traceback.extract_tb(error.__traceback__))
            traceback.clear_frames(error.__traceback__)  # they hold what the step has computed
            gc.collect()
            raise TrainingError(self._advice(error, evaluating)) from error

    def _advice(self, error: BaseException, evaluating: bool) -> str:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        if evaluating:
            batch, tokens = self.options.eval.batch_size, self.options.eval.max_new_tokens
            return (
                f"memory ran out while the held-out records were evaluated ({said}); lower eval.batch_size (it is "
                f"{batch}) or eval.max_new_tokens (it is {tokens}), or set eval.generate=false"
            )
        if self._planned is None:
            return f"memory ran out ({said}); `omnitune plan --table` with the same options names what fits"
        try:
            with announced("memory ran out; computing which settings fit"):
                return f"memory ran out ({said})\n" + self._settings(self._planned)
        except (OmniTuneError, MemoryError, RuntimeError, OSError) as failure:
            log.warning("which settings fit cannot be computed: %s", failure)
            return f"memory ran out ({said}); `omnitune plan --table` with the same options names what fits"

    def _settings(self, planned: Planned) -> str:
        options, on_cuda = _on_device(self.options, planned.device), planned.device.type == "cuda"
        found = choices(
            options, planned.family, planned.base, planned.plan, planned.records, planned.ranks, on_cuda=on_cuda
        )
        now = next((choice.memory for choice in found if not choice.changes), None) or self._predicted(planned)
        needs = (lambda memory: memory.total) if on_cuda else (lambda memory: memory.tensors)
        there = _memory_gib(planned.device)
        less = [choice for choice in found if choice.changes and choice.memory.tensors < now.tensors]
        fit = [choice for choice in less if there is None or needs(choice.memory) <= there]
        lines = [f"the largest pack is expected to need {needs(now):.2f} GiB: {_parts(now)}"]
        if fit:
            lines.append("these words make it less (GiB that are expected; add one of the lines to the command):")
        else:
            lines.append("nothing that was looked at is expected to fit; the least (GiB; more GPUs may do):")
        lines += [f"  {needs(choice.memory):7.2f}  {' '.join(choice.changes)}" for choice in _few(fit) or less[-1:]]
        lines.append(
            "with engine= or run.activation_checkpointing= alone the run goes on from its newest checkpoint; what else "
            "is changed needs a new run.dir"
        )
        return "\n".join(lines)


def _few(fit: Sequence[Choice]) -> list[Choice]:
    """Those that change the least, some of them without adapters; Muon is no way to save memory."""
    ordered = sorted(
        (choice for choice in fit if "optim.name=muon" not in choice.changes),
        key=lambda choice: (len(choice.changes), choice.work, choice.memory.total),
    )
    by_lora = [choice for choice in ordered if choice.changes[0].startswith("lora=")]
    others = [choice for choice in ordered if not choice.changes[0].startswith("lora=")]
    return others[:_NAMED] + by_lora[:_WITH_ADAPTERS]


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory ran out, or the machine's."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def _on_device(options: Options, device: torch.device) -> Options:
    """On a CPU nothing is offloaded to elsewhere."""
    if device.type == "cuda" or not options.engine.name.offloads:
        return options
    changed = deepcopy(options)
    changed.engine.name = Engine(options.engine.name.removesuffix("_offload"))
    return changed


def _memory_gib(device: torch.device) -> float | None:
    """GiB that this process has, and could still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (free + torch.cuda.memory_reserved(device)) / GIB
    available = available_memory()
    return None if available is None else available / GIB


def _parts(memory: GpuMemory) -> str:
    named = {
        "weights": memory.weights,
        "optimizer": memory.optimizer,
        "gradients": memory.gradients,
        "activations": max(memory.activations, memory.update),
    }
    return ", ".join(f"{name} {size:.2f}" for name, size in named.items())
