"""What runs of launch.sh need."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This interpreter as launch.sh's environment, under a stamp that tells it to install nothing.

    Links to the environment's folders would do too, but DeepSpeed compiles its operators anew for each path.
    """
    folder = tmp_path_factory.mktemp("venv")
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / ".installed").touch()
    return folder
