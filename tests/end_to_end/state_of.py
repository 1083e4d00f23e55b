"""Run by torchrun or alone: what a run holds right after it resumed, saved again at once, and its optimizer's settings.

state_of.py WORDS...
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from train.commands.options import compose_options  # noqa: E402
from train.engine.accelerator import close  # noqa: E402
from train.engine.build import build  # noqa: E402


def main(*words: str) -> None:
    """Write the checkpoint of the position at which the run resumed, and settings.json beside it."""
    run = build(*compose_options(list(words)))
    trainer = run.trainer
    engine = trainer.train_step.engine
    trainer.train_step.rates.set(engine.param_groups, trainer.position.step)
    settings = [
        {"label": group.label, "lr": target["lr"], "weight_decay": target["weight_decay"]}
        for target, group in zip(engine.param_groups, trainer.train_step.rates.groups, strict=True)
    ]
    states = [state for optimizer in inner(engine) for state in optimizer.state.values()]
    counts = sorted({float(state["step"]) for state in states if state})
    trainer.checkpoints.folder = run.folder.path / "again"
    trainer.save()
    trainer.checkpoints.newest()
    if run.accelerator.is_main_process:
        (run.folder.path / "again" / "settings.json").write_text(json.dumps({"groups": settings, "updates": counts}))
    close(run.accelerator)


def inner(engine):
    """Torch's or DeepSpeed's own Adams inside what accelerate and ZeRO put around them."""
    if hasattr(engine, "optimizers"):
        return engine.optimizers.optimizers
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return [optimizer]


if __name__ == "__main__":
    main(*sys.argv[1:])
