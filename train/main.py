"""Hydra entry point: compose the options, build the run, train, export.

accelerate launch train/main.py +recipe=full
"""

import sys
from pathlib import Path

# `python train/main.py` puts train/ first on the import path, where its files could shadow other packages.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from train.commands.options import register, typed  # noqa: E402
from train.errors import OmniTuneError  # noqa: E402

register()


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(config: DictConfig) -> None:
    """Train as the options say, and export the result."""
    try:
        train(config)
    except OmniTuneError as error:
        sys.exit(f"error: {error}")


def train(config: DictConfig) -> None:
    """Everything after the options are composed."""
    options, resolved = typed(config)

    from train.engine.build import build
    from train.engine.launch import close

    run = build(options, resolved)
    run.trainer.fit()
    folder = run.export()
    if run.accelerator.is_main_process:
        print(f"exported to {folder}", file=sys.stderr)
    close(run.accelerator, run.trainer.train_step.model)


if __name__ == "__main__":
    main()
