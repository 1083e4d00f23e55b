"""One loss: packed = one by one, and two micro-batches = one, in loss and in every module's gradient.

Each side is computed by training's own step, in fp32. Steps that are taken apart are summed up here, each with its
share of the weight: that is what the one step over all of them must give.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from train.certificate.lines import Line, compared, skipped
from train.certificate.records import batches, choose
from train.certificate.trials import trial
from train.config import Options, Precision
from train.engine.build import Run
from train.engine.build_data import limits_of
from train.engine.engines import Engine, OwnEngine
from train.engine.step import TrainStep
from train.export.checkpoint_reader import read_state, saved_state
from train.families.registry import find
from train.modules.trainable import Rules, canonical_name, module_of
from train.schema import Batch

TOLERANCE = 1e-4
"""How far a module's gradient in fp32 may differ, as a share of its norm, because sums are taken in another order."""

RECORDS = 8
"""Records that are packed at most."""

PACKED = "packed = one by one"
MICRO_BATCHES = "two micro-batches = one"


def gradient_lines(options: Options, base: Path, checkpoint: Path | None, folder: Path) -> list[Line]:
    """Both lines. checkpoint: whose weights are looked at; None = those of `base`."""
    with trial(options, base, folder, _exact) as run:
        if checkpoint:
            with saved_state(checkpoint) as saved:
                run.trainer.trained.load(saved, read_state(checkpoint), updates=0)
        chosen = choose(run.records, limits_of(options), RECORDS)
        if len(chosen) < 2:
            why = f"{len(chosen)} of the records that were looked at can be used, or fit in a pack together"
            return [skipped(PACKED, why), skipped(MICRO_BATCHES, why)]
        steps = _Steps(run, find(base).rules)
        half = len(chosen) // 2
        return [
            steps.line(PACKED, [chosen], [[one] for one in chosen]),
            steps.line(MICRO_BATCHES, [chosen[:half], chosen[half:]], [chosen[:half], chosen[half:]]),
        ]


def _exact(options: Options) -> None:
    """Take away what rounds, or draws by pack."""
    options.run.precision = Precision.fp32
    options.run.compile = options.run.liger_loss = False
    if options.lora.modules:
        options.lora.dropout = 0.0


class _Steps:
    """Training's steps over chosen records, and how far two ways to take them differ."""

    def __init__(self, run: Run, rules: Rules):
        self.records = run.records
        self.step: TrainStep = run.trainer.train_step
        assert isinstance(self.step.engine, OwnEngine)
        self.engine = self.step.engine = _Recording(self.step.engine)
        names = {parameter: canonical_name(name) for name, parameter in self.engine.model.named_parameters()}
        self.modules = [module_of(names[parameter], rules) for parameter in self.engine.inner.masters.parameters]

    def line(self, name: str, packs: Sequence[list[int]], apart: Sequence[list[int]]) -> Line:
        """packs: of one step. apart: the same records in packs that have a step each."""
        apart_loss, apart_gradients = self._apart(apart)
        loss, gradients = self._take(batches(self.records, packs))
        of_loss = abs(loss - apart_loss) / abs(apart_loss)
        worst, of_module = max(
            (figure, module) for module, figure in self._differences(gradients, apart_gradients).items()
        )
        count = sum(map(len, packs))
        why = f"{count} records: loss {of_loss:.1e}, gradient {worst:.1e} of its norm at most ({of_module}), fp32"
        return compared(name, max(of_loss, worst), TOLERANCE, why)

    def _apart(self, packs: Sequence[list[int]]) -> tuple[float, list[Tensor]]:
        """Loss and gradient of steps of a pack each, each by its share of the weight."""
        decoded = batches(self.records, packs)
        weights = [self.step.objective.weight(batch) for batch in decoded]
        total, loss, sums = sum(weights), 0.0, list[Tensor]()
        for batch, weight in zip(decoded, weights, strict=True):
            of_batch, gradients = self._take([batch])
            loss += of_batch * weight / total
            sums = sums or [torch.zeros_like(gradient) for gradient in gradients]
            for held, gradient in zip(sums, gradients, strict=True):
                held.add_(gradient, alpha=weight / total)
        return loss, sums

    def _take(self, packs: list[Batch]) -> tuple[float, list[Tensor]]:
        """Loss and gradient of a step; the weights stay as they are."""
        result = self.step(0, packs)
        return result.loss, self.engine.gradients

    def _differences(self, found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
        """Of each module's gradient, as a share of its norm; what has no gradient on either side differs by 0."""
        sums: dict[str, list[float]] = {}
        for module, a, b in zip(self.modules, found, expected, strict=True):
            of_module = sums.setdefault(module, [0.0, 0.0])
            of_module[0] += float((a - b).double().square().sum())
            of_module[1] += float(b.double().square().sum())
        return {module: (off / norm) ** 0.5 if norm else float(off > 0) for module, (off, norm) in sums.items()}


class _Recording(Engine):
    """An engine that keeps the gradient of a step, before it is clipped, and leaves the weights as they are."""

    def __init__(self, inner: OwnEngine):
        self.inner, self.model, self.param_groups = inner, inner.model, inner.param_groups
        self.gradients: list[Tensor] = []

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self.inner.backward(loss, is_last=is_last)

    def gradient_norm(self) -> Tensor:
        self.inner.masters.finish_reduction()
        self.gradients = [master.grad.clone() for master in self.inner.masters.masters if master.grad is not None]
        return self.inner.gradient_norm()

    def update(self, *, is_finite: bool) -> None:
        self.inner.update(is_finite=False)
