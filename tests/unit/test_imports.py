"""Who may import whom: the rules, read from the imports themselves."""

import ast
import re
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "train").rglob("*.py"), *(ROOT / "omnitune").rglob("*.py")])

BASE = {"train.schema", "train.errors", "train.announce", "train.wording", "train.model_settings", "train.run_folder"}
OURS = {
    "omnitune": {"train.auto", "train.errors", "train.inference.chat", "train.commands.main"},
    "train.schema": set(),
    "train.errors": set(),
    "train.announce": set(),
    "train.wording": set(),
    "train.model_settings": {"train.errors"},
    "train.run_folder": {"train.errors"},
    "train.config": {"train.errors"},
    "train.launcher": {"train.launcher"},
    "train.checks": {"train.checks", "train.schema", "train.errors", "train.config"},
    "train.data": BASE | {"train.data"},
    "train.modules": BASE | {"train.modules"},
    "train.families": BASE | {"train.families", "train.data", "train.modules"},
    "train.auto": BASE | {"train.families", "train.data", "train.modules"},
    "train.pages": BASE | {"train.pages", "train.data"},
    "train.sources": BASE | {"train.config", "train.families", "train.data"},
    "train.export": BASE
    | {"train.export", "train.config", "train.checks", "train.families", "train.data", "train.modules"},
    "train.inference": BASE | {"train.inference", "train.auto", "train.families", "train.data", "train.modules"},
    "train.report": BASE
    | {"train.report", "train.config", "train.sources", "train.pages", "train.inference", "train.data"},
    "train.engine": BASE
    | {
        "train.config",
        "train.checks",
        "train.sources",
        "train.pages",
        "train.report",
        "train.engine",
        "train.export",
        "train.inference",
        "train.families",
    }
    | {"train.data", "train.modules"},
}
OURS["train.certificate"] = OURS["train.engine"] | {"train.certificate"}
OURS["train.preflight"] = OURS["train.engine"] | {"train.preflight"}
ONLY_IN = {
    "accelerate": ("train.engine",),
    "deepspeed": ("train.engine",),
    "wandb": ("train.engine.tracking",),
    "tensorboard": ("train.engine.tracking",),
    "mlflow": ("train.engine.tracking",),
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


def ours(file: Path) -> set[str]:
    """The imports of this project's own modules."""
    return {name for name in imports(file) if name.startswith("train.")}


def within(module: str, packages: set[str] | tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_keep_to_the_rules(file: Path) -> None:
    importer = module_name(file)
    for imported in imports(file):
        package = imported.split(".")[0]
        if package in ONLY_IN:
            assert within(importer, ONLY_IN[package]), f"{importer} may not import {imported}"
        for owner, allowed in OURS.items():
            if within(importer, (owner,)) and package == "train":
                assert within(imported, allowed), f"{importer} may not import {imported}"


FAMILY_FILES = [file for file in FILES if len(file.relative_to(ROOT).parts) == 4 and "families" in file.parts]


@pytest.mark.parametrize("file", FAMILY_FILES, ids=module_name)
def test_only_a_familys_declaration_knows_both_its_model_and_its_processor(file: Path) -> None:
    assert file.name == "__init__.py" or not {"data", "modules"} <= {name.split(".")[1] for name in ours(file)}
    if file.name == "geometry.py":
        assert not ours(file)


def test_there_are_families_to_look_at() -> None:
    assert {file.parent.name for file in FAMILY_FILES} >= {"megrezo", "megrez_instruct", "minicpm"}


def test_the_imports_make_no_circle() -> None:
    modules = {module_name(file): file for file in FILES}
    graph = {name: {imported for imported in imports(file) if imported in modules} for name, file in modules.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    names = {re.split(r"[\s<>=;\[]", requirement)[0].lower().replace("-", "_") for requirement in declared}
    used = {name.split(".")[0] for file in FILES for name in imports(file)} - set(sys.stdlib_module_names)
    assert {PACKAGES.get(name, name) for name in used} - {"train", "omnitune", "vllm"} <= names


PACKAGES = {"PIL": "pillow", "yaml": "pyyaml", "hydra": "hydra_core", "mlflow": "mlflow_skinny"}
"""Packages whose module has another name."""

MODEL_NAMES = re.compile(r"megrez|minicpm|llama|granite", re.I)
MODEL_KINDS = {"model_type", "architectures"}


def asks_for_the_model(node: ast.AST) -> bool:
    """Whether a condition looks at a model's name: compares with one, or asks whether something is of its class."""
    if isinstance(node, ast.Call):
        is_asked = getattr(node.func, "id", None) in ("isinstance", "issubclass")
        return is_asked and any(MODEL_NAMES.search(ast.unparse(argument)) for argument in node.args[1:])
    if not isinstance(node, ast.Compare | ast.match_case):
        return False
    parts = list(ast.walk(node if isinstance(node, ast.Compare) else node.pattern))
    words = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    names = {part.attr for part in parts if isinstance(part, ast.Attribute)} | set(words)
    return bool(names & MODEL_KINDS) or any(map(MODEL_NAMES.search, words))


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_only_families_ask_for_a_models_name(file: Path) -> None:
    if within(module_name(file), ("train.families",)):
        return
    found = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if asks_for_the_model(node)]
    assert not found, f"{file}:{getattr(found[0], 'lineno', 0)}: put it into the family's declaration"


@pytest.mark.parametrize(
    ("code", "asks"),
    [
        ('if family.name == "minicpm": pass', True),
        ("x = 1 if config.model_type in KNOWN else 2", True),
        ('if "Llama" in config["architectures"][0]: pass', True),
        ("assert isinstance(model, MegrezO)", True),
        ('match name:\n    case "megrezo": pass', True),
        ('if engine.name == "ddp": pass', False),
        ('model = {"minicpm": 1}', False),
    ],
)
def test_the_search_for_models_names_finds_them(code: str, asks: bool) -> None:
    assert any(map(asks_for_the_model, ast.walk(ast.parse(code)))) == asks


def test_the_rules_cover_every_package() -> None:
    packages = {".".join(module_name(file).split(".")[:2]) for file in FILES if "train" in file.relative_to(ROOT).parts}
    assert packages - set(OURS) == {"train", "train.commands", "train.main"}


def test_import_train_is_light() -> None:
    assert imports(ROOT / "train" / "__init__.py") == set()
