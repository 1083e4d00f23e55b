"""Hydra: the schema, the recipes, and the way from command-line words to typed options."""

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.config import Options
from train.errors import OmniTuneError

_HERE = Path(__file__).resolve()
CONFIGS = _HERE.parents[1] / "configs"
RECIPES = _HERE.parents[2] / "recipes"


def register() -> None:
    """Make the typed schema and every file of recipes/ known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="options", node=Options)
    for file in sorted(RECIPES.glob("**/*.yaml")):
        name = file.relative_to(RECIPES).with_suffix("").as_posix()
        store.store(group="recipe", name=name, package="_global_", node=OmegaConf.load(file))


def typed(config: DictConfig) -> tuple[Options, dict[str, Any]]:
    """The composed options as dataclasses, and as plain values."""
    options = OmegaConf.to_object(config)
    assert isinstance(options, Options)
    resolved = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(resolved, dict)
    return options, {str(name): value for name, value in resolved.items()}


def compose_options(overrides: list[str]) -> tuple[Options, dict[str, Any]]:
    """The options that the same words would give on training's command line."""
    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return typed(compose("config", overrides=overrides))


def users_fault(error: Exception) -> str | None:
    """What to say of an error that the user can put right; None for any other."""
    if isinstance(error, OmniTuneError):
        return str(error)
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return "\n".join(str(part) for part in (error, error.__cause__) if part)
    return None
