"""Hydra entry point: compose the options, build the run, train, export.

accelerate launch train/main.py +recipe=full
"""

import os
import sys
from pathlib import Path

# `python train/main.py` puts train/ first on the import path, where its files could shadow other packages.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from train.commands.options import message_for_known_error, register, typed  # noqa: E402
from train.commands.sweep import Sweep  # noqa: E402
from train.launcher.failure import STOPPED, report_failure  # noqa: E402

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises its errors, and does not print them on every rank
register()
sweep = Sweep()


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
@report_failure(message_for_known_error)
def main(config: DictConfig) -> None:
    """Train as the options say, and export the result."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode is RunMode.MULTIRUN:
        sweep.run(__file__, hydra_config.overrides.task, config.run.dir)
        return
    options, resolved = typed(config, hydra_config.overrides.task)

    from train.commands.certify import certify_apart
    from train.engine.accelerator import close
    from train.engine.build import build
    from train.preflight.expected import Expectation

    expectation = Expectation(options)
    with expectation.explained():
        run = build(options, resolved, expectation)
        is_main = run.accelerator.is_main_process
        run.stop.listen()
        is_done = run.trainer.fit()
    folder = run.export() if is_done else None
    if is_main:
        if run.was_finished:
            said = f"the run is finished, there is nothing left to train; its model is in {folder}"
        elif folder:
            said = f"exported to {folder}"
        else:
            step = run.trainer.position.step
            said = f"stopped after step {step}; to resume, run the same command with run.dir={run.folder.path}"
        print(said, file=sys.stderr)
    close(run.accelerator)
    if not is_done:
        sys.exit(STOPPED)
    if is_main and options.run.certify and not (run.was_finished and run.folder.certificate.exists()):
        certify_apart(run.folder)


if __name__ == "__main__":
    with report_failure(message_for_known_error):  # Hydra's own faults too
        main()
        sweep.close()
