"""Resumed = unbroken, bit for bit; and what is frozen is what the base holds."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from train.certificate.lines import Line, compared, skipped
from train.certificate.trials import STEPS, trial
from train.config import Options
from train.engine.build import Run
from train.engine.evaluator import Evaluation
from train.engine.observers import StepReport
from train.export.shards import StoredTensors
from train.export.streamed import weights_of
from train.families.registry import find
from train.modules.trainable import canonical_name

RESUMED = "resumed = unbroken"
FROZEN = "frozen = base"


def resume_lines(options: Options, base: Path, folder: Path) -> list[Line]:
    """Both lines, of STEPS steps from the base on, with a checkpoint after half of them."""
    losses: list[list[float]] = []
    with trial(options, base, folder / "unbroken") as unbroken:
        quantized = _quantized(unbroken)
        losses.append(_fit(unbroken))
        frozen = _frozen(unbroken, base, quantized)
        checkpoints = unbroken.folder.checkpoints
    half = STEPS // 2

    def resume(mine: Options) -> None:
        mine.run.resume = str(checkpoints / f"step-{half:06d}")

    with trial(options, base, folder / "resumed", resume) as resumed:
        losses.append(_fit(resumed))
        again = resumed.folder.checkpoints
    differences = [abs(a - b) for a, b in zip(losses[0][2 * half :], losses[1], strict=True)]
    of_state, worst = _state_difference(*(where / f"step-{STEPS:06d}" for where in (checkpoints, again)))
    why = f"steps {half + 1} to {STEPS}: loss and gradient norm {max(differences):.1e}, saved state {of_state:.1e}"
    line = compared(RESUMED, max(*differences, of_state), 0.0, f"{why} ({worst})" if of_state else why)
    return [line, frozen]


class _Watch:
    """Notes the loss and the gradient norm of each step."""

    def __init__(self) -> None:
        self.figures: list[float] = []

    def on_step(self, report: StepReport) -> None:
        self.figures += [report.loss, report.grad_norm]

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        pass

    def close(self, *, failed: bool) -> None:
        pass


def _fit(run: Run) -> list[float]:
    watch = _Watch()
    run.trainer.observers = [watch]
    run.trainer.fit()
    return watch.figures


def _state_difference(one: Path, other: Path) -> tuple[float, str]:
    """The largest difference of any value in two checkpoints, and where; infinite where they hold other tensors."""
    [file] = [path.name for path in one.glob("*.safetensors")]
    with safe_open(one / file, "pt") as a, safe_open(other / file, "pt") as b:
        keys = set(a.keys())
        if keys != set(b.keys()):
            return float("inf"), "other tensors"
        return max((_largest(a.get_tensor(key), b.get_tensor(key)), key) for key in sorted(keys))


def _largest(a: Tensor, b: Tensor) -> float:
    if a.equal(b):
        return 0.0
    return float((a.double() - b.double()).abs().nan_to_num(nan=torch.inf).max())


def _frozen(run: Run, base: Path, quantized: dict[str, Tensor]) -> Line:
    """The values that training must not touch, compared with the base's in the dtype that the model computes in."""
    keys, stored = weights_of(base, find(base).skeleton(base)), StoredTensors(base)
    tensors, moved, first = 0, 0, ""
    for name, value in _untouched(run.trainer.train_step.engine.model):
        plain = canonical_name(name)
        if name not in quantized and plain not in keys:
            continue
        tensors += 1
        before = quantized[name] if name in quantized else stored[keys[plain]].to(value.dtype)
        if not value.detach().cpu().equal(before):
            moved += int((value.detach().cpu() != before).sum())
            first = first or plain
    if not tensors:
        return skipped(FROZEN, "nothing is frozen")
    about = f"{tensors} tensors after {STEPS} steps"
    return compared(
        FROZEN, float(moved), 0.0, f"{about}: {moved} values differ, in '{first}' first" if moved else about
    )


def _quantized(run: Run) -> dict[str, Tensor]:
    """Copies of the weights that are held in 4 bit, which are no longer the base's own."""
    model = run.trainer.train_step.engine.model
    return {name: value.detach().cpu().clone() for name, value in _untouched(model) if hasattr(value, "quant_state")}


def _untouched(model: nn.Module) -> list[tuple[str, Tensor]]:
    frozen = [(name, value) for name, value in model.named_parameters() if not value.requires_grad]
    return [*frozen, *model.named_buffers()]
