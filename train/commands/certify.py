"""Show on a run's own records that packing, resuming, freezing and exporting do what they promise."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from train.errors import CheckpointError, OmniTuneError
from train.run_folder import RunFolder

_LAUNCHERS = ("ACCELERATE_", "GROUP_", "LOCAL_", "MASTER_", "RANK", "ROLE_", "TORCHELASTIC_", "WORLD_SIZE")
"""Beginnings of variables by which a launcher tells a process that it is a rank."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's words."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--vllm-python", type=Path, help="Python of an environment with vLLM; default: this one")


def run(chosen: argparse.Namespace) -> None:
    """Print the certificate; exit code 1 where a line fails."""
    from train.commands.options import read_options

    folder = RunFolder(chosen.run)
    if not folder.config.is_file():
        raise CheckpointError(f"'{folder.path}' is not the folder of a run: it has no config.yaml")
    options = read_options(folder.config)

    from train.certificate.certify import certify
    from train.certificate.lines import table
    from train.engine.accelerator import quieten

    quieten()
    lines = certify(options, folder, chosen.vllm_python)
    print(table(lines))
    print(f"written to {folder.certificate}")
    sys.exit(int(any(line.passed is False for line in lines)))


def certify_apart(folder: RunFolder) -> None:
    """The same in a process of its own, after the ranks of a run. Raises OmniTuneError where a line fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    if subprocess.run([sys.executable, "-m", "omnitune", "certify", folder.path], env=environment).returncode:
        raise OmniTuneError(f"the run is finished, and its certificate fails: see '{folder.certificate}'")
