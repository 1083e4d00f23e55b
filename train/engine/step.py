"""One optimizer step over packs: one loss, whatever the packs, micro-batches and ranks.

loss = Σ weight · cross-entropy / Σ weight, over all supervised tokens of the step on all ranks.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.engine.optimizer import LearningRates
from train.engine.stop import StopRequest
from train.modules.objectives import Objective
from train.schema import KINDS, Batch, Kind


@dataclass(frozen=True)
class StepResult:
    """Sums over all ranks, and the means made of them.

    rates: the learning rate of each parameter group, by its label.
    updated: False where a loss or a gradient was not finite: then the parameters are as they were, on every rank.
    suspects: where nothing was updated, the records on this rank whose loss was not finite.
    stop: whether some rank was asked to stop.
    source_losses: float64 (sources,), NaN for a source that this step had nothing of.
    flops: floating-point operations that the step needed (see `modules.flops`).
    device_wait_s: seconds that this rank waited for its device.
    """

    loss: float
    source_losses: Tensor
    grad_norm: float
    tokens: int
    supervised_tokens: int
    bad_records: int
    rates: dict[str, float] = field(default_factory=dict)
    updated: bool = True
    suspects: list[int] = field(default_factory=list)
    stop: bool = False
    flops: float = 0.0
    device_wait_s: float = 0.0


class TrainStep:
    """Computes gradients and updates the parameters; every rank must call it with equally many packs.

    objective: what is learned.
    seed: what dropout is drawn from, with the step and a pack's records: the same whatever the number of ranks, and
    after any stop.
    media: the kind of media without which a module is idle in a step, by module (see `Family.media`).
    stop: asked at the end of each step, so that all ranks know of it alike.
    work: floating-point operations of a pack.
    max_grad_norm: global L2 norm that gradients are scaled down to (0 = never); under DeepSpeed its own
    configuration says it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        rates: LearningRates,
        *,
        objective: Objective,
        seed: int,
        media: Mapping[str, Kind],
        sources: int,
        max_grad_norm: float,
        work: Callable[[Batch], float] = lambda _: 0.0,
        stop: StopRequest | None = None,
    ):
        self.accelerator, self.model, self.optimizer, self.rates = accelerator, model, optimizer, rates
        self.objective, self.seed = objective, seed
        self.media, self.sources, self.max_grad_norm = media, sources, max_grad_norm
        self.work = work
        self.stop = stop or StopRequest()
        self._device_wait_s = 0.0
        self._deepspeed = accelerator.distributed_type == "DEEPSPEED"

    def __call__(self, step: int, batches: Sequence[Batch], bad_records: int = 0) -> StepResult:
        """Step number `step`, from 0 on, over this rank's packs; `bad_records` is summed over the ranks."""
        self._device_wait_s = 0.0
        counts = self._summed(
            torch.tensor(
                [
                    sum(self.objective.weight(batch) for batch in batches),
                    sum(int(batch.cu_seqlens[-1]) for batch in batches if batch.records),
                    sum(int((batch.loss_weights > 0).sum()) for batch in batches),
                    bad_records,
                    sum(map(self.work, batches)),
                    *(sum(batch.units(kind) for batch in batches) for kind in KINDS),
                ],
                dtype=torch.float64,
            )
        )
        weight = float(counts[0])
        # DeepSpeed updates in its last backward, so the rates are set before it.
        rates = self.rates.set(self.optimizer, step, self._idle(counts[5:]))
        # Row 2 tells of requests to stop. All of it stays on the device until the step ends: a look would wait for it.
        sums = torch.zeros(3, self.sources, dtype=torch.float64, device=self.accelerator.device)
        losses: list[Tensor] = []
        for index, batch in enumerate(batches):
            torch.manual_seed(_seed_of(self.seed, step, batch.records))
            here = batch.to(self.accelerator.device)
            losses.append(self._forward_backward(here, weight, is_last=index == len(batches) - 1).double())
            weights = here.loss_weights.double()
            sums[0].index_add_(0, here.target_sources, losses[-1] * weights)
            sums[1].index_add_(0, here.target_sources, weights)
        grad_norm = self._update()
        updated = math.isfinite(grad_norm)
        found = [] if updated else list(map(_not_finite, losses, batches))
        sums[2] = float(self.stop.requested)
        sums = self._summed(sums)
        return StepResult(
            loss=float(sums[0].sum()) / weight if weight else 0.0,
            source_losses=sums[0] / sums[1],
            grad_norm=grad_norm,
            tokens=int(counts[1]),
            supervised_tokens=int(counts[2]),
            bad_records=int(counts[3]),
            rates=rates,
            updated=updated,
            suspects=[record for of_pack in found for record in of_pack],
            stop=bool(sums[2].any()),
            flops=float(counts[4]),
            device_wait_s=self._device_wait_s,
        )

    def _idle(self, units: Tensor) -> set[str]:
        """The modules that nothing in the step uses: their gradient is the dummy's zero. units: of each of KINDS."""
        used = {kind for kind, count in zip(KINDS, units.tolist(), strict=True) if count}
        return {module for module, kind in self.media.items() if kind not in used}

    def _forward_backward(self, batch: Batch, weight: float, *, is_last: bool) -> Tensor:
        """The pack's share of the step's gradient; returns the loss of each target.

        The engines average gradients over the ranks, so the sum is scaled up by their number.
        """
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        with self._without_reduction() if not is_last else nullcontext():
            loss = self.objective.loss(self.model, batch)
            scale = self.accelerator.num_processes / weight if weight else 0.0
            self.accelerator.backward(loss.total * scale)
        return loss.each

    def _without_reduction(self) -> AbstractContextManager:
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def _update(self) -> float:
        """Clip and step (DeepSpeed did both in its last backward); returns the norm before clipping.

        The norm is that of all ranks' gradients together, so where it is not finite, all ranks leave the step out.
        """
        if self._deepspeed:
            return float(self._fetch(torch.as_tensor(cast(Any, self.model).get_global_grad_norm())))
        limit = self.max_grad_norm or float("inf")
        grad_norm = float(self._fetch(self.accelerator.clip_grad_norm_(self.model.parameters(), limit)))
        if math.isfinite(grad_norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return grad_norm

    def _summed(self, values: Tensor) -> Tensor:
        """The sums over all ranks, on the host. What lies there already does not leave it where one rank is all."""
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
        return self._fetch(values)

    def _fetch(self, values: Tensor) -> Tensor:
        """Copy to the host: all that is waited for the device in a step is waited for here."""
        began = time.perf_counter()
        here = values.cpu()
        self._device_wait_s += time.perf_counter() - began
        return here


def _seed_of(seed: int, step: int, records: Sequence[int]) -> int:
    """Where the random numbers of a pack's forward begin."""
    digest = hashlib.blake2b(repr((seed, step, list(records))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _not_finite(losses: Tensor, batch: Batch) -> list[int]:
    """The records of a pack in whose targets' losses (M,) something is not finite."""
    places = batch.target_positions.cpu()[~losses.isfinite().cpu()]
    samples = torch.searchsorted(batch.cu_seqlens, places, right=True) - 1
    return [batch.records[sample] for sample in samples.unique().tolist()]
