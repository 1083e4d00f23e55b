"""Checks of the settings that a model folder's files state: what is wrong with each, by its name."""

from collections.abc import Mapping, Sequence
from typing import Any

from train.errors import CheckpointError


def fixed_faults(settings: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[str]:
    """Of each key that is stated with another value than the one that is implemented."""
    return [
        f"{key} is {settings[key]!r}, where only {value!r} is implemented"
        for key, value in fixed.items()
        if key in settings and (settings[key] != value or isinstance(settings[key], bool) != isinstance(value, bool))
    ]


def count_faults(settings: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Of each key that is no whole number from 1."""
    wanted = "a whole number from 1"
    faults = kind_faults(settings, int, **dict.fromkeys(names, wanted))
    return faults or [f"{name} is {settings[name]!r}, where it is {wanted}" for name in names if settings[name] < 1]


def scale_faults(settings: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Of each key that is no number above 0."""
    wanted = "a number above 0"
    faults = kind_faults(settings, (int, float), **dict.fromkeys(names, wanted))
    return faults or [f"{name} is {settings[name]!r}, where it is {wanted}" for name in names if settings[name] <= 0]


def kind_faults(settings: Mapping[str, Any], kind: type | tuple[type, ...], **names: str) -> list[str]:
    """Of each key that is of no such type; its name's value says what it is to be."""
    return [
        f"{name} is {settings[name]!r}, where it is {wanted}"
        for name, wanted in names.items()
        if not isinstance(settings[name], kind) or (kind is not bool and isinstance(settings[name], bool))
    ]


def multiple_faults(whole: int, **parts: int) -> list[str]:
    """Of each of `parts` that does not divide `whole`."""
    return [f"{name} is {part}, which does not divide {whole}" for name, part in parts.items() if whole % part]


def refuse(faults: list[str]) -> None:
    """CheckpointError with all faults, if there are any."""
    if faults:
        raise CheckpointError("; ".join(faults))
