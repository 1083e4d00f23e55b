"""launch.sh makes the environment: what it installs, and what of torchaudio it removes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def set_up(folder: Path, cuda: str | None) -> tuple[list[str], list[str]]:
    """What pip is asked for, and what is left of torchaudio's libraries, beside a torch for that CUDA."""
    packages = folder / "lib" / "python3.11" / "site-packages"
    libraries = packages / "torchaudio" / "lib"
    libraries.mkdir(parents=True)
    for name in ("_torchaudio.abi3.so", "libtorchaudio.abi3.so", "__init__.py"):
        (libraries / name).touch()
    (packages / "torch.py").write_text(
        f"class version:\n    cuda, hip = {cuda!r}, None\n"
        f"class cuda:\n    is_available = staticmethod(lambda: {cuda is not None})\n"
    )
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        f"""#!/bin/sh
if [ "$1" = -m ]; then echo "$*" >> "{folder}/asked"; exit 0; fi
PYTHONPATH="{packages}" exec "{sys.executable}" -S "$@"
"""
    )
    python.chmod(0o755)
    subprocess.run([ROOT / "launch.sh", "--setup"], env=os.environ | {"OMNITUNE_VENV": str(folder)}, check=True)
    assert (folder / ".installed").exists()
    return (folder / "asked").read_text().splitlines(), sorted(file.name for file in libraries.iterdir())


@pytest.mark.parametrize(
    ("cuda", "extras", "left"),
    [
        (None, "train,demo,test,audio", ["__init__.py"]),
        ("13.0", "train,demo,test,audio,gpu", ["__init__.py", "_torchaudio.abi3.so", "libtorchaudio.abi3.so"]),
    ],
)
def test_torchaudios_libraries_go_where_torch_has_no_cuda(
    cuda: str | None, extras: str, left: list[str], tmp_path: Path
) -> None:
    asked, found = set_up(tmp_path, cuda)
    assert asked[-1].endswith(f"-e .[{extras}]")
    assert found == left


def test_torchaudio_is_imported_beside_what_once_broke() -> None:
    """transformers' feature extractor did not load beside a torchaudio that could not be imported."""
    pytest.importorskip("torchaudio")
    code = "import torchaudio.functional, peft; from transformers import WhisperFeatureExtractor as W; W(80)"
    subprocess.run([sys.executable, "-c", code], check=True)
