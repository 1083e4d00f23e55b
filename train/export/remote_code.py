"""Our classes as files of a model folder, which transformers loads with `trust_remote_code=True`.

transformers wants them flat: `train.modules.attention` becomes modules_attention.py, and an import of it
`from .modules_attention import X`; all else stays as it stands here. What the classes import is followed.
"""

import ast
import json
from pathlib import Path

from train.errors import OmniTuneError
from train.families.family import Family

_SOURCES = Path(__file__).resolve().parents[2]
_PACKAGE = "train"

_SETTINGS = ("config.json", "processor_config.json", "preprocessor_config.json")
"""Where transformers finds our classes by an `auto_map`; in other files it would name code that is not ours."""


def add_remote_code(folder: Path, family: Family) -> None:
    """Put the family's classes into a model folder, and name them in its `auto_map`s.

    All stand behind one file, modeling_<family>.py: transformers gives each file that an `auto_map` names modules of
    its own, and a class would not be the same class in two of them.

    Raises OmniTuneError for a family whose classes are transformers' own.
    """
    if not family.auto_classes:
        raise OmniTuneError(
            f"a {family.name} model needs no code of its own, transformers has it; leave the option out"
        )
    for name, source in flat_files(family).items():
        (folder / name).write_text(source, encoding="utf-8")
    auto_map = {auto: f"{_entry(family)}.{name.partition(':')[2]}" for auto, name in family.auto_classes.items()}
    for file in folder.glob("*.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and (file.name in _SETTINGS or "auto_map" in settings):
            settings.pop("auto_map", None)
            settings |= {"auto_map": auto_map} if file.name in _SETTINGS else {}
            file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def flat_files(family: Family) -> dict[str, str]:
    """The files' contents by name."""
    classes: dict[str, set[str]] = {}
    for reference in family.auto_classes.values():
        module, _, name = reference.partition(":")
        classes.setdefault(module, set()).add(name)
    lines = [f'"""{family.name}: the classes that transformers loads (trust_remote_code=True)."""', ""]
    lines += [f"from .{_flat(module)} import {', '.join(sorted(names))}" for module, names in sorted(classes.items())]
    files = {f"{_entry(family)}.py": "\n".join(lines) + "\n"}
    todo = list(classes)
    while todo:
        module = todo.pop()
        if f"{_flat(module)}.py" not in files:
            files[f"{_flat(module)}.py"], imported = _flattened(module)
            todo += imported
    return files


def _flattened(module: str) -> tuple[str, list[str]]:
    """A module's source with flat imports, and the modules of ours that it imports."""
    path = _SOURCES.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    source = file.read_text(encoding="utf-8")
    lines, imported = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"{_PACKAGE}."):
            line = node.lineno - 1
            lines[line] = lines[line].replace(f"from {node.module} ", f"from .{_flat(str(node.module))} ", 1)
            imported.append(str(node.module))
    return "".join(lines), imported


def _flat(module: str) -> str:
    return module.removeprefix(f"{_PACKAGE}.").replace(".", "_")


def _entry(family: Family) -> str:
    return f"modeling_{family.name}"
