"""How long a run takes to find its place again at step 10 and at step 100,000, and how long a save keeps it waiting.

python benchmarks/resume.py [--json FILE]
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from measure import finish, print_table, use_one_core
from step import build, model_config
from workload import draw

from train.config import DataOptions, OptimizerName, OptimOptions
from train.data.loader import StepLoader, StepPlan
from train.data.plan import Limits
from train.data.record_set import Measured, RecordSet, SourceSpec
from train.engine.checkpoint import Checkpoints
from train.engine.engines import OwnEngine
from train.engine.state import trained_state
from train.export.checkpoint_reader import saved_state
from train.families.registry import find
from train.modules.trainable import Group

ROOT = Path(__file__).resolve().parents[1]
STEPS = (10, 100_000)
PACKS_PER_STEP = 8


def place_of(plan: StepPlan, step: int) -> tuple[int, int]:
    """(epoch, step in it) of a step as a checkpoint says it; all epochs are taken to be as long as the first."""
    return divmod(step, plan.steps_in(0))


def finding(records: int) -> list[dict[str, Any]]:
    """Seconds from a checkpoint's place to its packs (of drawn records), and to a decoded batch (of the sample)."""
    options = DataOptions()
    limits = Limits(options.max_tokens, {"image": options.max_patches, "audio": options.max_frames})
    drawn = Measured(draw(records).lengths(), ["drawn"] * records, np.array([records]))
    processor = find(ROOT / "data/tiny").load_processor(ROOT / "data/tiny")
    sample = ROOT / "data/sample"
    source = SourceSpec("train", str(sample / "train.jsonl"), str(sample))
    opened = RecordSet([source], processor, max_tokens=512, too_long="quarantine")
    measured, _ = opened.measure()

    def plan_of(held: Measured, held_limits: Limits) -> StepPlan:
        return StepPlan(held, [1.0], held_limits, packs_per_step=PACKS_PER_STEP, seed=0, epochs=10**6, max_steps=None)

    small = Limits(512, {"image": options.max_patches, "audio": options.max_frames})
    rows = []
    for step in STEPS:
        places = [place_of(plan_of(drawn, limits), step), place_of(plan_of(measured, small), step)]
        began = time.perf_counter()
        next(plan_of(drawn, limits).steps(*places[0]))
        planned = time.perf_counter()
        epoch, in_epoch = places[1]
        loader = StepLoader(plan_of(measured, small), opened, rank=0, world_size=1, epoch=epoch, step_in_epoch=in_epoch)
        next(iter(loader))
        rows.append(
            {
                "step": step,
                "packs_s": planned - began,
                "packs_epoch": places[0][0],
                "batch_s": time.perf_counter() - planned,
                "batch_epoch": epoch,
            }
        )
    return rows


def saving(size: str) -> dict[str, Any]:
    """Seconds that a save keeps training waiting, that writing goes on beside it, and that reading back takes."""
    accelerator = Accelerator(cpu=True)
    model = build(model_config(size), "cpu")
    groups = [Group("all", "llm", 1e-4, 0.0, False, list(model.parameters()))]
    engine = OwnEngine(accelerator, model, groups, OptimOptions(), torch.float32)
    engine.update(is_finite=True)
    trained = trained_state(accelerator, engine, OptimizerName.adamw, zero_stage=0)
    folder = Path(tempfile.mkdtemp())
    try:
        checkpoints = Checkpoints(folder, accelerator, keep_last=1)
        began = time.perf_counter()
        checkpoints.save(trained.tensors, {"step": 1, **trained.description(), "world_size": 1})
        waited = time.perf_counter()
        newest = checkpoints.newest()
        written = time.perf_counter()
        checkpoints.find("auto")
        checked = time.perf_counter()
        with saved_state(newest) as saved:
            trained.load(saved, trained.description(), updates=1)
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "file_mib": sum(file.stat().st_size for file in newest.iterdir()) / 2**20,
            "stall_s": waited - began,
            "write_s": written - waited,
            "check_s": checked - written,
            "load_s": time.perf_counter() - checked,
        }
    finally:
        shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000, help="drawn records of the plan")
    parser.add_argument("--size", choices=("tiny", "cpu"), default="cpu", help="model that is saved")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    chosen = parser.parse_args(arguments)
    use_one_core()
    figures: dict[str, Any] = {"records": chosen.records, "finding": finding(chosen.records)}
    figures["saving"] = saving(chosen.size)
    print_table(figures["finding"])
    print_table([figures["saving"]])
    finish(figures, chosen.json)


if __name__ == "__main__":
    main()
