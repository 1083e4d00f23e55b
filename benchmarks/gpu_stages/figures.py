"""What a stage is told, and what it gives."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


class Skipped(Exception):
    """This stage cannot run here; why."""


@dataclass(frozen=True)
class Setting:
    """device: `cuda` or `cpu`; size: `4b` or `tiny`; folder: for models and runs."""

    device: str
    size: str
    folder: Path

    @property
    def is_real(self) -> bool:
        """Whether speeds and sizes are those that the accepted limits are for."""
        return self.device == "cuda" and self.size == "4b"

    def of_size(self, real: int, tiny: int) -> int:
        """A number of things to do, by the size."""
        return real if self.size == "4b" else tiny

    def speed(self, name: str, value: float, unit: str, **limits: float) -> dict[str, Any]:
        """A figure whose limits hold on a GPU at the real size alone."""
        return figure(name, value, unit, **limits) | ({} if self.is_real else {"ok": None})

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class _Figure:
    name: str
    value: float
    unit: str
    at_least: float | None
    at_most: float | None
    ok: bool | None


def figure(
    name: str, value: float, unit: str, *, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    """A figure, with the limits that are accepted; `ok` is None where there is none."""
    ok = None
    if at_least is not None or at_most is not None:
        ok = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return asdict(_Figure(name, value, unit, at_least, at_most, ok))


def equal_bits(name: str, is_equal: bool) -> dict[str, Any]:
    """The figure that says whether two runs gave the same bits."""
    return figure(name, float(is_equal), "1 = equal bits", at_least=1)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    expected = expected.detach().double()
    return float((found.detach().to(expected.device).double() - expected).abs().max() / expected.abs().max())
