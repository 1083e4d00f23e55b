"""What a run ran on, for whoever wants to run it again."""

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from accelerate import Accelerator

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "datasets",
    "wandb",
    "hydra-core",
    "omnitune",
)


def write_environment(file: Path, accelerator: Accelerator, total_steps: int) -> None:
    """Write to a file: versions, commit, command and its working folder, planned steps, ranks and device."""
    environment = {
        "python": platform.python_version(),
        "versions": versions(),
        "commit": _commit(),
        "command": sys.argv,
        "working_folder": str(Path.cwd()),
        "total_steps": total_steps,
        "world_size": accelerator.num_processes,
        "device": str(accelerator.device),
    }
    file.write_text(json.dumps(environment, indent=2) + "\n")


def versions() -> dict[str, str | None]:
    """The versions of the packages that a run stands on; None where one is not installed."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _commit() -> str | None:
    """The project's commit, with "+" where files were changed since; None outside a checkout."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
