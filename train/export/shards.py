"""The safetensors shards of a model folder: written again one tensor at a time, all but the changed ones bit for bit.

A shard is a JSON header (dtype, shape and place of each tensor) after its length in 8 bytes, and then the tensors one
behind the other. Source: the format's description in the safetensors project.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from train.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Change = Callable[[Tensor], Tensor]
"""From a tensor's old value to its new one."""


def shards_of(folder: Path) -> list[Path]:
    """The files that hold the weights of a model folder. Raises CheckpointError where one is missing."""
    names = [_SINGLE]
    if (folder / INDEX).is_file() and not (folder / _SINGLE).exists():  # as transformers chooses between them
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"'{folder}' lacks the weights '{name}'; copy it again, with weights in safetensors")
    return [folder / name for name in names]


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The dtype of each tensor of floating-point numbers, by key."""
    return {key: _FLOATS[dtype] for key, (dtype, _) in stored_shapes(folder).items() if dtype in _FLOATS}


def stored_shapes(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """The dtype, by its name in safetensors, and the shape of each tensor, by key, from the shards' headers."""
    stored: dict[str, tuple[str, list[int]]] = {}
    for shard in shards_of(folder):
        with shard.open("rb") as file:
            entries = _entries(_header(file))
        stored |= {key: (entry["dtype"], entry["shape"]) for key, entry in entries.items()}
    return stored


class StoredTensors(Mapping[str, Tensor]):
    """All tensors of a model folder by key, as stored; mapped into memory when they are asked for, not copied."""

    def __init__(self, folder: Path):
        self._places: dict[str, Any] = {}
        for shard in shards_of(folder):
            held = safe_open(shard, "pt")
            self._places |= dict.fromkeys(held.keys(), held)

    def __getitem__(self, key: str) -> Tensor:
        return self._places[key].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def rewrite_shard(source: Path, target: Path, changes: Mapping[str, Change]) -> None:
    """Write `source` again to `target` under the same header, with the tensors changed that `changes` names by key.

    Holds no more than one tensor at a time. Raises CheckpointError where a new value has another shape.
    """
    with source.open("rb") as old, target.open("wb") as new:
        header = _header(old)
        new.write(len(header).to_bytes(8, "little") + header)
        for key, entry in _entries(header).items():
            begin, end = entry["data_offsets"]
            data = bytearray(old.read(end - begin))
            new.write(_changed(source, key, entry, data, changes[key]) if key in changes else data)


def _changed(source: Path, key: str, entry: Mapping[str, Any], data: bytearray, change: Change) -> memoryview:
    """The bytes of a tensor's new value, in the dtype of the old one."""
    dtype, shape = _FLOATS[entry["dtype"]], entry["shape"]
    value = change(torch.frombuffer(data, dtype=dtype).view(shape))
    if list(value.shape) != shape:
        raise CheckpointError(f"'{source}' holds '{key}' of shape {shape}, and trained was {list(value.shape)}")
    return value.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data


def _header(file: BinaryIO) -> bytes:
    """The header of a shard. Raises CheckpointError where the file is not as long as it says, or has none."""
    size = os.fstat(file.fileno()).st_size
    header = file.read(min(int.from_bytes(file.read(8), "little"), size))
    try:
        end = max((entry["data_offsets"][1] for entry in _entries(header).values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        end = None
    if end is None or size != 8 + len(header) + end:
        raise CheckpointError(f"'{file.name}' is cut short or damaged; copy it again")
    return header


def _entries(header: bytes) -> dict[str, dict[str, Any]]:
    """The tensors by key, in the order in which they lie in the file."""
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    return dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))
