"""Options are honest: the schema knows them, something reads them, and every recipe composes."""

import dataclasses
import re
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException

from train.checks import check
from train.commands.options import RECIPES, compose_options
from train.config import Options

ROOT = Path(__file__).resolve().parents[2]
RECIPE_NAMES = sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.glob("**/*.yaml"))


def leaves(kind: type, prefix: str = "") -> list[str]:
    found = []
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(item.type):
            found += leaves(item.type, f"{prefix}{item.name}.")
        else:
            found.append(prefix + item.name)
    return found


def test_these_are_the_recipes() -> None:
    assert RECIPE_NAMES == ["align", "full", "lora", "minicpm_lora", "minicpm_qlora", "qlora", "websearch"]


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_every_recipe_composes_and_passes_the_checks(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options, _ = compose_options([f"+recipe={recipe}"])
    check(options)
    assert options.run.name == recipe
    assert options.run.dir.startswith(f"outputs/{recipe}/")


@pytest.mark.parametrize(
    "word",
    [f"{file.parent.name}={file.stem}" for file in sorted((ROOT / "train/configs").glob("*/*.yaml"))],
)
def test_every_group_composes(word: str) -> None:
    compose_options([word])


def test_an_unknown_key_is_an_error() -> None:
    with pytest.raises(ConfigCompositionException, match=r"Could not override 'run\.max_step'"):
        compose_options(["run.max_step=3"])


@pytest.mark.parametrize("option", leaves(Options))
def test_every_field_is_read_somewhere(option: str) -> None:
    """Outside config.py and checks.py, the code names each field as an attribute."""
    files = [file for file in (ROOT / "train").rglob("*.py") if file.name not in ("config.py", "checks.py")]
    name = option.split(".")[-1]
    read_as_a_whole = {"modules.lr": "asdict(options.modules.lr)", "modules": "tuned_modules(options)"}
    parent = ".".join(option.split(".")[:-1])
    text = "\n".join(file.read_text() for file in files)
    if parent in read_as_a_whole:
        assert read_as_a_whole[parent] in text
    else:
        assert re.search(rf"\.{name}\b", text), f"nothing reads {option}"
