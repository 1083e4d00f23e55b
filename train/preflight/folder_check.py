"""A model folder as a whole, without loading it: its files, and each shard's keys, shapes and dtypes."""

from pathlib import Path
from typing import Any

from torch import nn

from train.errors import CheckpointError
from train.export.base_folder import check_files
from train.export.model_folder import check_base
from train.export.shards import stored_shapes
from train.families.family import Family

_NAMED = 3
"""Most keys that a message names."""


def check_model_folder(family: Family, folder: Path, *, weights: bool) -> tuple[list[str], list[str]]:
    """What is wrong with a model folder, and what is odd about it and changes nothing.

    weights: whether it must hold any; else its settings alone are looked at.
    """
    try:
        check_files(folder)
        skeleton = family.skeleton(folder)
        if not weights:
            return [], []
        faults, odd = _compare(folder, skeleton)
        if not faults:
            check_base(folder, skeleton, [name for name, _ in skeleton.named_parameters()])
    except CheckpointError as fault:
        return [str(fault)], []
    return faults, odd


def _compare(folder: Path, skeleton: nn.Module) -> tuple[list[str], list[str]]:
    wanted: dict[str, Any] = skeleton.state_dict(keep_vars=True)
    stored = stored_shapes(folder)
    held = {id(value) for key, value in wanted.items() if key in stored}  # a tied one is stored once
    lacking = sorted(key for key, value in wanted.items() if key not in stored and id(value) not in held)
    shared = sorted(wanted.keys() & stored.keys())
    shapes = [
        f"'{key}' has the shape {stored[key][1]}, and config.json asks for {list(wanted[key].shape)}"
        for key in shared
        if stored[key][1] != list(wanted[key].shape)
    ]
    dtypes = [f"'{key}' is {stored[key][0]}" for key in shared if not stored[key][0].startswith(("F", "BF"))]
    faults = []
    if lacking:
        faults.append(f"{folder}: {len(lacking)} weights are missing: {_named(lacking)}; copy the folder again")
    if shapes:
        faults.append(f"{folder}: {len(shapes)} weights are of another model: {_named(shapes)}")
    if dtypes:
        faults.append(f"{folder}: {len(dtypes)} weights are not floating-point numbers: {_named(dtypes)}")
    unknown = sorted(stored.keys() - wanted.keys())
    odd = [f"{folder}: {len(unknown)} tensors that this model has no place for: {_named(unknown)}"] if unknown else []
    return faults, odd


def _named(names: list[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
