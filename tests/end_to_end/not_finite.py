"""Run by torchrun: training in which one rank's loss of the third step is not a number.

not_finite.py WORDS...
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from train.commands.options import compose_options  # noqa: E402
from train.engine.accelerator import close  # noqa: E402
from train.engine.build import build  # noqa: E402

SPOILED = 2


def main(*words: str) -> None:
    """Train with the loss of rank 1 spoiled in one step, and export."""
    run = build(*compose_options(list(words)))
    if run.accelerator.process_index == 1:
        engine = run.trainer.train_step.engine
        backward = engine.backward
        engine.backward = lambda loss, **how: backward(
            loss * float("nan") if run.trainer.position.step == SPOILED else loss, **how
        )
    run.trainer.fit()
    run.export()
    close(run.accelerator)


if __name__ == "__main__":
    main(*sys.argv[1:])
