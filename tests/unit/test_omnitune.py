"""`import omnitune`, from scripts of any name."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import omnitune
from transformers import AutoConfig

print(type(AutoConfig.from_pretrained(FOLDER)).__module__)
assert issubclass(omnitune.BadRecord, omnitune.OmniTuneError) and callable(omnitune.Chat.load)
import sys
heavy = {"hydra", "peft", "deepspeed", "wandb", "datasets", "gradio", "vllm"} & set(sys.modules)
assert not heavy, heavy
""".replace("FOLDER", repr(str(ROOT / "data" / "tiny")))


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python in a folder, with the project behind what stands in that folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", ["train.py", "mine.py"])
def test_it_works_whatever_the_script_is_called(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(SCRIPT)
    done = run(tmp_path / name, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "train.families.megrezo.model\n"


def test_another_module_train_that_came_first_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    (tmp_path / "mine.py").write_text("import train\nimport omnitune\n")
    done = run(tmp_path / "mine.py", folder=tmp_path)
    assert f"ImportError: '{tmp_path / 'train.py'}' was imported as `train`" in done.stderr
    assert "rename that file" in done.stderr


def test_the_version_is_told_beside_a_train_py(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('mine')")
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    done = run("-m", "omnitune", "--version", folder=tmp_path)
    assert re.fullmatch(r"omnitune [0-9.]+\n", done.stdout), done.stderr
    assert done.stdout == f"omnitune {stated}\n"
