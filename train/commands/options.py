"""Hydra: the schema, the recipes, and the way from command-line words to typed options."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from train.checks.tuning import idle_lora
from train.config import CheckpointingOptions, DataOptions, Options, RunOptions, SourceOptions
from train.errors import ConfigError, OmniTuneError, message_for_user

_HERE = Path(__file__).resolve()
CONFIGS = _HERE.parents[1] / "configs"
RECIPES = _HERE.parents[2] / "recipes"

_LARGEST, _DEEPEST = 2**18, 50
"""Bytes and levels that a run's config.yaml may have."""

_OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


@dataclass
class _AnyData(DataOptions):
    train: Any = field(default_factory=list)
    eval: Any = field(default_factory=list)


@dataclass
class _AnyRun(RunOptions):
    activation_checkpointing: Any = field(default_factory=lambda: asdict(CheckpointingOptions()))


@dataclass
class _Composed(Options):
    """What Hydra composes: a source may still be the path alone, activation checkpointing one value for all parts."""

    data: _AnyData = field(default_factory=_AnyData)
    run: _AnyRun = field(default_factory=_AnyRun)


_RENAMED = {
    "run.save_every": "checkpoint.save_every",
    "run.keep_last": "checkpoint.keep_last",
    "run.keep_best": "checkpoint.keep_best",
    "run.eval_every": "eval.every",
    "run.export_with_code": "export.with_code",
    "tracker.name": "tracker",
}
"""Options that had another name."""

_SPELLINGS = {False: "none", True: "full"}
"""How `run.activation_checkpointing`, which was true or false, is written now."""

_NEAR = 0.6
"""How alike two names are, from 0 to 1, for the one to be meant by the other."""


def register() -> None:
    """Make the typed schema and every file of recipes/ known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="options", node=_Composed)
    for file in sorted(RECIPES.glob("**/*.yaml")):
        name = file.relative_to(RECIPES).with_suffix("").as_posix()
        store.store(group="recipe", name=name, package="_global_", node=OmegaConf.load(file))


def typed(config: DictConfig, words: Iterable[str]) -> tuple[Options, dict[str, Any]]:
    """The composed options as dataclasses, and as plain values.

    words: the command line's overrides. Raises ConfigError where they hold a key that nothing would read.
    """
    resolved = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(resolved, dict)
    resolved["run"]["activation_checkpointing"] = _of_each_part(resolved["run"]["activation_checkpointing"])
    faults = [_no_such_option(name) for name in _unknown(resolved, Options)]
    if faults:
        raise ConfigError(faults)
    for group in ("train", "eval"):
        resolved["data"][group] = _sources(resolved["data"][group])
    whole = OmegaConf.merge(OmegaConf.structured(Options), resolved)
    options = OmegaConf.to_object(whole)
    assert isinstance(options, Options)
    if faults := idle_lora(options, {word.lstrip("+").partition("=")[0] for word in words}):
        raise ConfigError(faults)
    values = OmegaConf.to_container(whole, enum_to_str=True)
    assert isinstance(values, dict)
    return options, {str(name): value for name, value in values.items()}


def _sources(value: Any) -> list[Any]:
    """The entries of `data.train` or `data.eval`, given as a list or as one; a string is the path of a file."""
    entries = value if isinstance(value, list) else [value] if value else []
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


def _of_each_part(value: Any) -> dict[Any, Any]:
    """`run.activation_checkpointing`, given by part or as one value for all parts."""
    if isinstance(value, dict):
        return value
    if isinstance(value, bool):
        raise ConfigError(
            [
                f"run.activation_checkpointing={str(value).lower()} is now run.activation_checkpointing="
                f"{_SPELLINGS[value]}; write that, or a number n for every n-th layer"
            ]
        )
    return {part.name: value for part in fields(CheckpointingOptions)}


def compose_options(overrides: list[str]) -> tuple[Options, dict[str, Any]]:
    """The options that the same words would give on training's command line."""
    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return typed(compose("config", overrides=overrides), overrides)


def options_of(words: list[str]) -> tuple[Options, dict[str, Any]]:
    """`compose_options`, with an OmniTuneError for whatever is wrong with the words."""
    try:
        return compose_options(words)
    except Exception as error:
        fault = message_for_known_error(error)
        if fault is None:
            raise
        raise OmniTuneError(fault) from None


def read_options(file: Path) -> Options:
    """The options of a run, from its config.yaml. Raises OmniTuneError where that is not what a run wrote."""
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"it is larger than {_LARGEST} bytes")
        text = file.read_text(encoding="utf-8")
        _check_bounded(text)
        config = OmegaConf.merge(OmegaConf.structured(Options), _with_new_names(yaml.safe_load(text)))
        options = OmegaConf.to_object(config)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise OmniTuneError(f"'{file}' does not hold the options of a run: {error}") from None
    assert isinstance(options, Options)
    return options


def _with_new_names(values: Any) -> DictConfig:
    """A run's options, those of an earlier version under their names of today."""
    config = OmegaConf.create(values)
    if config.get("tracker", {}).pop("name", None) == "wandb":
        config.tracker.wandb = True
    for old, new in _RENAMED.items():
        group, _, name = old.partition(".")
        if name in config.get(group, {}):
            OmegaConf.update(config, new, config[group].pop(name))
    was = config.get("run", {}).get("activation_checkpointing")
    if isinstance(was, bool):
        config.run.activation_checkpointing = _of_each_part(_SPELLINGS[was])
    return config


def _check_bounded(text: str) -> None:
    """Raise ValueError where reading a YAML text could take for ever: no run writes aliases or deep nesting."""
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken):
            raise ValueError("it has aliases (*name)")
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > _DEEPEST:
            raise ValueError(f"it is nested deeper than {_DEEPEST} levels")


def message_for_known_error(error: Exception) -> str | None:
    """What to say of an error that the user can put right; None for any other."""
    if fault := message_for_user(error):
        return fault
    if isinstance(error, OverrideParseException):
        return _not_an_override(error)
    cause = error.__cause__ or error
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.object_type is not None:
        return _no_such_option(str(cause.full_key), cause.object_type)
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return "\n".join(_without_jargon(str(part)) for part in (error, error.__cause__) if part)
    return None


def _without_jargon(said: str) -> str:
    """Hydra's message without what only its developers need."""
    said = said.partition("\nConfig search path:")[0].partition("\n    full_key:")[0]
    return re.sub(r"\. No match in the defaults list\.\nTo append to your default list use (\S+)", r"; write \1", said)


def _not_an_override(error: OverrideParseException) -> str:
    """What to say of a word that Hydra cannot read: most often the shell has cut or changed it."""
    name = error.override.partition("=")[0].lstrip("+~")
    example = """'data.train=[{path: photos.jsonl, weight: 2}]'"""
    if name.startswith("data."):
        example += ", or without brackets where a path is all: data.train=photos.jsonl"
    return (
        f"`{error.override}` cannot be read as an option ({' '.join(error.message.split())}); put the whole option in "
        f"single quotes, such as {example}. A value with punctuation needs double quotes within them: "
        """'data.system_prompt="Answer briefly (in French)."'"""
    )


def _unknown(values: Mapping[Any, Any], kind: Any, prefix: str = "") -> Iterator[str]:
    """The keys that a group of options does not have; Hydra lets a "+" add any."""
    known = {item.name: item.type for item in fields(kind)}
    for key, value in values.items():
        if key not in known:
            yield f"{prefix}{key}"
        elif is_dataclass(known[key]):
            yield from _unknown(value, known[key], f"{prefix}{key}.")


def _no_such_option(name: str, kind: Any = Options) -> str:
    """A message that names the nearest option, by the whole name or its last part."""
    if name in _RENAMED:
        return f"the option '{name}' is now {_RENAMED[name]}; write that"
    if name in _names(Options):
        group = name.rpartition(".")[0]
        return f"'{name}' stands beside '{group}', which gives one value to all its parts; leave out one of the two"
    what = " of a source" if kind is SourceOptions else ""
    kind = kind if what else Options

    def nearness(known: str) -> float:
        pairs = (name, known), (name.rpartition(".")[2], known.rpartition(".")[2])
        return max(SequenceMatcher(None, *pair).ratio() for pair in pairs)

    nearest = max(_names(kind), key=nearness)
    advice = f"did you mean {nearest}?" if nearness(nearest) > _NEAR else "train/config.py lists them all"
    return f"there is no option '{name}'{what}; {advice}"


def _names(kind: Any, prefix: str = "") -> Iterator[str]:
    for item in fields(kind):
        yield f"{prefix}{item.name}"
        if is_dataclass(item.type):
            yield from _names(item.type, f"{prefix}{item.name}.")
