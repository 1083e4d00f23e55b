"""What runs of launch.sh need."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment of these tests under a stamp that tells launch.sh to use it as it is."""
    folder = tmp_path_factory.mktemp("venv")
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".installed":
            (folder / entry.name).symlink_to(entry)
    (folder / ".installed").touch()
    return folder
