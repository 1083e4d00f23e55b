"""What a run looks at before it reads its data."""

import os
import shutil
from pathlib import Path

import pytest

from train.config import Options
from train.engine.build_data import length_cache

TINY = Path(__file__).resolve().parents[3] / "data" / "tiny"


@pytest.mark.timeout(60)
def test_what_is_no_file_in_a_model_folder_is_passed_by(tmp_path: Path) -> None:
    """A pipe that nobody writes to would be waited for."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    os.mkfifo(folder / "x.json")
    (folder / "y.json").mkdir()
    options = Options()
    options.data.cache = str(tmp_path / "cache")
    assert length_cache(options, folder) is not None
