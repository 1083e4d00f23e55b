"""What a checkpoint holds: read and checked here, written by `engine.checkpoint`.

step-000200/
  manifest.json              size and checksum of every other file; its presence says that all is there
  state.json                 where the run stands: `Trainer.save` in engine/trainer.py lists its keys
  rank-00000.safetensors     each rank's part of the trained state

A rank's part is made of fragments: stretches of flattened parameters, float32, under keys "<kind>/<name>/<start>".
The ranks' parts together hold each parameter's fp32 master weights and both Adam moments once, whatever the engine and
the number of ranks were, so any other engine on any number of ranks can read from them what it needs. The state of
other optimizers is there under its own names, 8-bit codes and their scales as they are.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from train.errors import CheckpointError
from train.run_folder import RunFolder
from train.wording import counted

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


class SavedState:
    """The fragments in the files of a checkpoint, read where they are asked for."""

    def __init__(self, files: list[Path]):
        self._open = ExitStack()
        self._fragments: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for file in files:
            held = self._open.enter_context(safe_open(file, "pt"))
            for key in held.keys():  # noqa: SIM118  (not a mapping)
                kind, name, start = key.split("/")
                size = held.get_slice(key).get_shape()[0]
                self._fragments.setdefault((kind, name), []).append((int(start), size, held, key))

    def __enter__(self) -> "SavedState":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, kind: str, name: str, start: int, size: int) -> Tensor:
        """(size,): a stretch of a flattened tensor, as stored, put together of the fragments that hold it."""
        parts = []
        for first, count, held, key in sorted(self._fragments[kind, name], key=itemgetter(0)):
            low, high = max(first, start), min(first + count, start + size)
            if low < high:
                parts.append(held.get_slice(key)[low - first : high - first])
        return torch.cat(parts) if parts else torch.empty(0)


class TrainedWeights(Mapping[str, Tensor]):
    """fp32 master weights of a checkpoint's trained parameters, by name, read when they are asked for."""

    def __init__(self, folder: Path):
        self._shapes: dict[str, list[int]] = read_state(folder)["parameters"]
        self._saved = saved_state(folder)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return self._saved.read(MASTER, name, 0, prod(shape)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def trained_weights(folder: Path) -> TrainedWeights:
    """What a checkpoint's run has learned. Raises CheckpointError where the checkpoint is damaged."""
    if fault := damage(folder):
        raise CheckpointError(f"'{folder}' {fault}")
    return TrainedWeights(folder)


def saved_state(folder: Path) -> SavedState:
    """The tensors of a checkpoint."""
    return SavedState([folder / name for name in sorted(_rank_files(folder))])


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json says. Raises CheckpointError where it cannot be read."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{folder}' is damaged: {STATE} cannot be read ({error})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"'{folder}' is damaged: {STATE} holds no state")
    return state


def damage(folder: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing is; reading them may be divided into `parts`."""
    if fault := _lack(folder):
        return fault
    files = _manifest(folder)
    for name in sorted(files)[part::parts]:
        if checksum(folder / name) != files[name][1]:
            return f"is damaged: {name} does not have its checksum"
    return None


def _lack(folder: Path) -> str | None:
    """What is wrong with a checkpoint as far as it shows without reading the tensors."""
    try:
        files = _manifest(folder)
    except FileNotFoundError:
        return f"is not a complete checkpoint: it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"is damaged: {MANIFEST} cannot be read"
    if fault := _misfit(folder, files):
        return f"is damaged: {fault}"
    for name, (size, _) in sorted(files.items()):
        if (folder / name).stat().st_size != size:
            return f"is damaged: {name} has {(folder / name).stat().st_size} bytes, and had {size}"
    return None


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and checksum of each file, as the manifest lists them."""
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {name: (int(files[name]["bytes"]), str(files[name]["blake2b"])) for name in files}


def _misfit(folder: Path, files: Mapping[str, object]) -> str | None:
    """Where the manifest's list, the folder's name and the files there are do not belong together."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        ranks, step = range(state["world_size"]), state["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{STATE} cannot be read"
    expected = {STATE, *(rank_file(rank) for rank in ranks)}
    if lost := sorted(name for name in expected if not (folder / name).is_file()):
        return f"{lost[0]} is gone"
    if unlisted := sorted((expected | _rank_files(folder)) - files.keys(), reverse=True):
        return f"{MANIFEST} does not list {unlisted[0]}"
    if foreign := sorted(files.keys() - expected):
        return f"{MANIFEST} lists '{foreign[0]}', which is no part of a checkpoint of {counted(len(ranks), 'rank')}"
    if step_of(folder) not in (None, step):
        return f"its {STATE} is of step {step}"
    return None


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _rank_files(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("rank-*.safetensors")}


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None for any other folder."""
    number = folder.name.removeprefix("step-")
    return int(number) if number != folder.name and number.isascii() and number.isdecimal() else None


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's checkpoints/, oldest first; what else lies there is left out."""
    found = {path: step for path in folder.glob("step-*") if (step := step_of(path)) is not None}
    return sorted((path for path in found if (path / MANIFEST).is_file()), key=lambda path: found[path])


def newest_whole(folder: Path) -> Path:
    """The newest checkpoint of a run's folder that lacks nothing, or `folder` itself where it is a checkpoint.

    Checksums are not compared: `trained_weights` does. Raises CheckpointError where there is none.
    """
    if (folder / MANIFEST).is_file():
        return folder
    found = first_whole(complete_checkpoints(RunFolder(folder).checkpoints)[::-1], _lack)
    if not found:
        raise CheckpointError(f"'{folder}' is neither a complete checkpoint nor a run's folder that holds one")
    return found


def first_whole(candidates: Iterable[Path], fault_of: Callable[[Path], str | None]) -> Path | None:
    """The first undamaged checkpoint; the damaged ones before it are named."""
    for folder in candidates:
        fault = fault_of(folder)
        if not fault:
            return folder
        log.warning("'%s' %s; going on with the one before", folder, fault)
    return None


def checksum(file: Path) -> str:
    """Of a file's contents."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
