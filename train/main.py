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
from omegaconf import DictConfig  # noqa: E402

from train.commands.options import register, typed, users_fault  # noqa: E402
from train.launcher.failure import STOPPED, told_to_the_launcher  # noqa: E402

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises its errors, and does not print them on every rank
register()


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
@told_to_the_launcher(users_fault)
def main(config: DictConfig) -> None:
    """Train as the options say, and export the result."""
    options, resolved = typed(config, HydraConfig.get().overrides.task)

    from train.engine.accelerator import close
    from train.engine.build import build

    run = build(options, resolved)
    run.stop.listen()
    is_done = run.trainer.fit()
    folder = run.export() if is_done else None
    if run.accelerator.is_main_process:
        print(f"exported to {folder}" if is_done else "stopped; the same command goes on", file=sys.stderr)
    close(run.accelerator)
    if not is_done:
        sys.exit(STOPPED)


if __name__ == "__main__":
    with told_to_the_launcher(users_fault):  # Hydra's own faults too
        main()
