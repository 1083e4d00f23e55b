"""Who may import whom: the rules of the house, read from the imports themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "train").rglob("*.py"))

BASE = {"train.schema", "train.errors", "train.geometry"}
OURS = {
    "train.schema": set(),
    "train.errors": set(),
    "train.geometry": set(),
    "train.config": {"train.errors"},
    "train.launcher": {"train.launcher"},
    "train.checks": {"train.schema", "train.errors", "train.geometry", "train.config"},
    "train.data": BASE | {"train.data"},
    "train.modules": BASE | {"train.modules"},
    "train.families": BASE | {"train.families", "train.data", "train.modules"},
    "train.auto": BASE | {"train.families", "train.data", "train.modules"},
    "train.inference": BASE | {"train.inference", "train.auto", "train.families", "train.data", "train.modules"},
    "train.engine": BASE
    | {"train.config", "train.checks", "train.engine", "train.inference", "train.families"}
    | {"train.data", "train.modules"},
}
ONLY_IN = {
    "accelerate": ("train.engine",),
    "deepspeed": ("train.engine",),
    "wandb": ("train.engine.tracking",),
    "peft": ("train.modules.adapters",),
    "hydra": ("train.commands", "train.main"),
    "gradio": ("train.inference.demo",),
    "vllm": ("train.inference.vllm_plugin",),
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
            if node.module == "train":
                found |= {f"train.{name.name}" for name in node.names}
    return found - {"train"}


def within(module: str, rooms: set[str] | tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_keep_to_the_rooms(file: Path) -> None:
    importer = module_name(file)
    for imported in imports(file):
        room = imported.split(".")[0]
        if room in ONLY_IN:
            assert within(importer, ONLY_IN[room]), f"{importer} may not import {imported}"
        for owner, allowed in OURS.items():
            if within(importer, (owner,)) and room == "train":
                assert within(imported, allowed), f"{importer} may not import {imported}"


def test_the_rules_see_every_room() -> None:
    rooms = {".".join(module_name(file).split(".")[:2]) for file in FILES}
    assert rooms - set(OURS) == {"train", "train.commands", "train.main"}


def test_import_train_is_light() -> None:
    assert imports(ROOT / "train" / "__init__.py") == set()
