"""Options as text: those that differ from the defaults, or between runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from train.config import Options, SourceOptions


def different(options: Options) -> list[tuple[str, str, str]]:
    """(name, value, default) of each option that is not as train/config.py has it."""
    defaults = flat(Options())
    return [
        (name, value, defaults.get(name, "")) for name, value in flat(options).items() if value != defaults.get(name)
    ]


def differing(runs: Sequence[Options]) -> list[tuple[str, list[str]]]:
    """(name, value in each run) of each option that is not the same in all of them, but for the run's folder."""
    tables = [flat(options) for options in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [(name, [table.get(name, "") for table in tables]) for name in names if name != "run.dir"]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def flat(options: Options) -> dict[str, str]:
    """Every option by its whole name, its value as on a command line."""
    return dict(_flat(asdict(options), ""))


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", _text(value)))
    return found


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        usual = asdict(SourceOptions())
        return f"{{{', '.join(f'{name}: {_text(of)}' for name, of in value.items() if of != usual.get(name, ...))}}}"
    return str(value) if isinstance(value, str) else json.dumps(value)
