"""Short runs in which the promises are looked at: the user's options, in one process, a few steps long."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch

from train.config import CheckpointOptions, DebugOptions, Engine, EngineOptions, Options, TrackerOptions
from train.engine.accelerator import close
from train.engine.build import Run, build

STEPS = 4
"""Optimizer steps of a trial; its first checkpoint is saved after half of them."""

_PACKS = 2
"""Packs in an optimizer step at most."""


@contextmanager
def trial(
    options: Options, base: Path, folder: Path, change: Callable[[Options], None] = lambda _: None
) -> Iterator[Run]:
    """A run that is built and has not begun, which watches nothing; everything it holds is freed after.

    options: of the user's run. base: the model it started from. folder: of the trial. change: made last to the options.
    """
    mine = deepcopy(options)
    mine.model.path, mine.model.random_from = str(base), None
    mine.engine = EngineOptions(name=Engine.none)
    mine.tracker, mine.debug = TrackerOptions(), DebugOptions()
    mine.checkpoint = CheckpointOptions(save_every=STEPS // 2, keep_last=0)
    mine.data.eval = []
    mine.run.dir, mine.run.resume = str(folder), "never"
    mine.run.max_steps = mine.run.epochs = STEPS
    mine.run.packs_per_step = min(_PACKS, mine.run.packs_per_step)
    mine.run.stop_after_no_gain, mine.run.gain_figure = 0, ""
    mine.run.deterministic = torch.cuda.is_available()
    mine.optim.warmup_ratio = 0.0
    change(mine)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    with _quiet():
        run = build(mine, json.loads(json.dumps(asdict(mine))))
        try:
            run.trainer.observers = []
            yield run
        finally:
            run.trainer.let_go()
            close(run.accelerator)
            torch.use_deterministic_algorithms(was_deterministic)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, nothing below a warning is logged: a trial's progress is nobody's concern."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)
