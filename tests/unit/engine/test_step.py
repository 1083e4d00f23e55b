"""The step waits for its device as seldom as it can. (What it computes, the end-to-end tests say.)"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import build_here, write_records
from tests.unit.engine.device_watch import DEVICE, DeviceWatch
from train.engine.build import Run

WAITS = 1
"""For the gradient's norm and the sums of the step together."""


def built(folder: Path, *words: str) -> Run:
    """A run on the device that `DeviceWatch` takes for one, with pinned batches."""
    given = [*write_records(folder), "model=tiny", "data.eval=[]", "run.max_steps=2", "run.packs_per_step=3"]
    return build_here([*given, f"run.dir={folder / 'run'}", *words])


def watched_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> tuple[DeviceWatch, Any]:
    """A second step (the first one makes what lasts) under watch, and what it gave."""
    monkeypatch.setattr(run.accelerator.state, "device", DEVICE)
    step = run.trainer.train_step
    step.engine.model.train()
    watch = DeviceWatch()
    watch.hold(*step.engine.model.parameters(), *step.engine.model.buffers())
    batches = next(iter(run.trainer.steps_from(0, 0))).batches
    with watch.watching():
        step(0, [batch.pin_memory() for batch in batches])
        for seen in (watch.waits, watch.blocking, watch.pageable):
            seen.clear()
        result = step(1, [batch.pin_memory() for batch in batches])
    return watch, result


@pytest.mark.parametrize(("tuning", "precision"), [("none", "bf16"), ("lora", "bf16"), ("none", "fp32")])
def test_a_step_waits_for_its_device_only_at_its_end(
    tuning: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No wait before the last backward; and what is copied to the device is pinned, and not waited for."""
    watch, result = watched_step(built(tmp_path, f"lora={tuning}", f"run.precision={precision}"), monkeypatch)
    assert result.updated
    assert watch.waits == ["step.py _fetch"] * WAITS
    assert (watch.blocking, watch.pageable) == ([], [])


def test_the_watch_sees_what_waits() -> None:
    watch = DeviceWatch()
    host = torch.arange(3.0)
    with watch.watching():
        there = host.to(DEVICE)
        assert (len(watch.blocking), len(watch.pageable)) == (1, 1)
        there = host.pin_memory().to(DEVICE, non_blocking=True)
        torch.tensor([1.0], device=DEVICE)
        assert (len(watch.blocking), len(watch.pageable)) == (2, 2)
        double = there * 2
        assert not watch.waits
        assert float(host.sum()) == 3
        assert not watch.waits
        reads = (float, bool)
        for read in reads:
            read(double.sum())
        double.tolist()
        double.cpu()
        double.to("cpu")
        double.nonzero()
        double[double > 1]
        assert len(watch.waits) == len(reads) + 5
        double.cpu().tolist()
        assert len(watch.waits) == len(reads) + 6
