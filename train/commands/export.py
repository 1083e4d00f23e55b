"""Make a model folder from a checkpoint of a run."""

import argparse
from pathlib import Path

from train.errors import CheckpointError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's words."""
    parser.add_argument("checkpoint", type=Path, help="a run's folder (its newest checkpoint), or one checkpoint in it")
    parser.add_argument("--out", type=Path, help="where to write; default: export/ in the run's folder")


def run(chosen: argparse.Namespace) -> None:
    """Export, and say where to."""
    from omegaconf import OmegaConf

    from train.config import Options
    from train.engine.build import RANDOM_MODEL, export_arguments
    from train.engine.checkpoint import MANIFEST, trained_weights
    from train.families import find
    from train.inference.export import export

    checkpoint = _newest(chosen.checkpoint, MANIFEST)
    folder = checkpoint.parent.parent
    config = folder / "config.yaml"
    if not config.is_file():
        raise CheckpointError(f"'{folder}' has no config.yaml, so '{checkpoint}' is not a checkpoint of a run")
    options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), OmegaConf.load(config)))
    assert isinstance(options, Options)
    base = Path(options.model.path) if options.model.path else folder / RANDOM_MODEL
    out = chosen.out or folder / "export"
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"'{out}' is not empty; name another folder with --out")
    export(base, trained_weights(checkpoint), out, **export_arguments(options, find(base)))
    print(f"exported {checkpoint} to {out}")


def _newest(folder: Path, marker: str) -> Path:
    if (folder / marker).is_file():
        return folder
    found = sorted(path.parent for path in folder.glob(f"checkpoints/step-*/{marker}"))
    if not found:
        raise CheckpointError(f"'{folder}' is neither a complete checkpoint nor a run's folder that holds one")
    return found[-1]
