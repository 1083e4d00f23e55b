"""Run by torchrun or alone: several runs from first step to export, one after the other in one process group.

    runs_of.py RUNS.json

RUNS.json is a list of lists of Hydra words, `run.dir` among them. A run that takes more than two minutes ends the
process with every thread's stack.
"""

import faulthandler
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from tests.runs import forget, forget_accelerator  # noqa: E402
from train.commands.options import compose_options  # noqa: E402
from train.engine.accelerator import close  # noqa: E402
from train.engine.build import build  # noqa: E402

LIMIT_S = 120


def main(runs: list[list[str]]) -> None:
    """Train and export each."""
    for words in runs:
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        forget_accelerator()
        run = build(*compose_options(words))
        run.trainer.fit()
        run.export()
        forget(run)
    faulthandler.cancel_dump_traceback_later()
    close(run.accelerator)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
