"""The flat files are the sources, and nothing else is needed to load them."""

import ast
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from train.errors import OmniTuneError
from train.export.remote_code import add_remote_code, flat_files
from train.families.megrezo import MEGREZO
from train.families.minicpm import MINICPM

ROOT = Path(__file__).resolve().parents[3]
ENTRIES = {"modeling_megrezo.py": flat_files(MEGREZO), "modeling_minicpm.py": flat_files(MINICPM)}
FILES = {name: source for files in ENTRIES.values() for name, source in files.items()}
INSTALLED = {"torch", "transformers", "PIL", "soundfile", "numpy", "tokenizers"}
"""What torch, transformers, Pillow and soundfile bring."""


def source_of(name: str) -> Path:
    """The one source whose path gives a flat name."""
    [found] = [
        path
        for path in (ROOT / "train").rglob("*.py")
        if "_".join(path.relative_to(ROOT / "train").with_suffix("").parts).removesuffix("___init__") == name[:-3]
    ]
    return found


@pytest.mark.parametrize("name", sorted(FILES.keys() - ENTRIES.keys()))
def test_a_flat_file_is_its_source(name: str) -> None:
    flat, source = FILES[name].splitlines(), source_of(name).read_text(encoding="utf-8").splitlines()
    assert len(flat) == len(source)
    for ours, theirs in zip(flat, source, strict=True):
        if ours != theirs:
            module = re.fullmatch(r"(\s*from )train\.([\w.]+)( import .*)", theirs)
            assert module
            assert ours == f"{module[1]}.{module[2].replace('.', '_')}{module[3]}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_flat_file_needs_nothing_that_is_absent(name: str, tmp_path: Path) -> None:
    for node in ast.walk(ast.parse(FILES[name])):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "train" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] != "train"
            assert node.level == 0 or f"{node.module}.py" in FILES
    (tmp_path / name).write_text(FILES[name])
    assert set(get_imports(tmp_path / name)) <= INSTALLED | set(sys.stdlib_module_names)


@pytest.mark.parametrize("entry", ENTRIES)
def test_transformers_finds_every_file_from_the_entry(entry: str, tmp_path: Path) -> None:
    for name, source in ENTRIES[entry].items():
        (tmp_path / name).write_text(source)
    assert {Path(path).name for path in get_relative_import_files(tmp_path / entry)} == ENTRIES[entry].keys() - {entry}


def test_settings_name_the_classes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "megrezo", "auto_map": {"AutoModel": "old.Old"}}')
    (tmp_path / "preprocessor_config.json").write_text('{"scale_resolution": 448}')
    add_remote_code(tmp_path, MEGREZO)
    config, images = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("config", "preprocessor_config"))
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_megrezo.MegrezO"
    assert config["auto_map"]["AutoModel"] == "modeling_megrezo.MegrezO"
    assert images["auto_map"]["AutoProcessor"] == "modeling_megrezo.MegrezOProcessor"
    assert images["scale_resolution"] == 448
    assert {path.name for path in tmp_path.glob("*.py")} == ENTRIES["modeling_megrezo.py"].keys()


def test_a_family_of_transformers_own_classes_has_no_code_to_carry(tmp_path: Path) -> None:
    with pytest.raises(OmniTuneError, match="a plain model needs no code of its own"):
        add_remote_code(tmp_path, replace(MEGREZO, name="plain", auto_classes={}))
