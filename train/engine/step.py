"""One optimizer step over packs: one loss, whatever the packs, micro-batches and ranks.

loss = Σ weight · cross-entropy / Σ weight, over all supervised tokens of the step on all ranks.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from train.engine.accelerator import hosts_are_connected
from train.engine.engines import Engine
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
    """

    def __init__(
        self,
        accelerator: Accelerator,
        engine: Engine,
        rates: LearningRates,
        *,
        objective: Objective,
        seed: int,
        media: Mapping[str, Kind],
        sources: int,
        work: Callable[[Batch], float] = lambda _: 0.0,
        stop: StopRequest | None = None,
    ):
        self.accelerator, self.engine, self.rates = accelerator, engine, rates
        self.objective, self.seed = objective, seed
        self.media, self.sources = media, sources
        self.work = work
        self.stop = stop or StopRequest()
        self._device_wait_s = 0.0

    def __call__(self, step: int, batches: Sequence[Batch], bad_records: int = 0) -> StepResult:
        """Step number `step`, from 0 on, over this rank's packs; `bad_records` is summed over the ranks."""
        self._device_wait_s = 0.0
        counts = self._counts(
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
        rates = self.rates.set(self.engine.param_groups, step, self._idle(counts[5:]))
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
        sums[2] = float(self.stop.requested)
        grad_norm, sums = self._on_host(self.engine.gradient_norm(), self._reduced(sums))
        updated = math.isfinite(grad_norm)
        self.engine.update(is_finite=updated)
        found = [] if updated else list(map(_not_finite, losses, batches))
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
        """The pack's share of the step's gradient; returns the loss of each target."""
        loss = self.objective.loss(self.engine.model, batch)
        self.engine.backward(loss.total * (1 / weight if weight else 0.0), is_last=is_last)
        return loss.each

    def _counts(self, of_rank: Tensor) -> Tensor:
        """The sums of all ranks' counts, on the host: they leave it only where hosts cannot sum them."""
        if self.accelerator.num_processes == 1:
            return of_rank
        if hosts_are_connected():
            return self._reduced(of_rank)
        return self._fetch(self._reduced(of_rank.to(self.accelerator.device)))

    def _reduced(self, values: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(values, reduction="sum"))

    def _on_host(self, grad_norm: Tensor, sums: Tensor) -> tuple[float, Tensor]:
        """The norm and the sums in one copy: the host's one wait for the device in a step."""
        both = self._fetch(torch.cat([grad_norm.double().reshape(1), sums.flatten()]))
        return float(both[0]), both[1:].view_as(sums)

    def _fetch(self, values: Tensor) -> Tensor:
        """Copy to the host, and count the time: all that a step waits for its device is waited for here."""
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
