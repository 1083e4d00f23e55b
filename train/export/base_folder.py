"""Whether a model folder can be the base of an export: what it holds, and the room that its export takes."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from stat import S_ISREG

from torch import Tensor, nn

from train.errors import CheckpointError
from train.export.shards import StoredTensors, shards_of

WEIGHTS = ("model*.safetensors", "pytorch_model*", "tf_model*", "flax_model*", "consolidated*")
"""A model's weights in this form and others, which training leaves behind the times."""

ADAPTER = "adapter"
REPORT = "export.json"
_NOT_COPIED = (*WEIGHTS, ADAPTER, REPORT, ".git", ".cache")

_GIB = 2**30
_BESIDES = 2 * _GIB
"""Memory of the check besides weights: libraries, activations, logits."""


def side_files(base: Path) -> list[Path]:
    """The files and folders at the top of a model folder that an export takes along."""
    return [path for path in sorted(base.iterdir()) if not any(path.match(pattern) for pattern in _NOT_COPIED)]


def check_files(base: Path) -> None:
    """Raise CheckpointError for what an export could not take along, or must not.

    A link may lead to a file within the folder, or to the blobs of the Hub's cache that the folder is a snapshot in.
    """
    if (base / "adapter_config.json").exists():
        raise CheckpointError(
            f"'{base / 'adapter_config.json'}': the folder holds an adapter, which would be loaded beside the model; "
            "merge it into its model, or put it into another folder"
        )
    root = base.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in _walk(side_files(base)):
        if fault := _fault(path, homes):
            raise CheckpointError(f"'{path}' {fault}; put the file itself there, or remove it")


def _walk(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            yield from _walk(sorted(path.iterdir()))
        else:
            yield path


def _fault(path: Path, homes: list[Path]) -> str | None:
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError):  # dangling, in a circle, or not ours to look at
        return "is a link that leads nowhere" if path.is_symlink() else "cannot be read"
    if not any(target.is_relative_to(home) for home in homes):
        return f"is a link out of the model folder, to '{target}'"
    if not S_ISREG(mode):
        return "is a link to a folder" if target.is_dir() else "is neither a file nor a folder"
    return None if os.access(path, os.R_OK) else "cannot be read"


def check_room(base: Path, skeleton: nn.Module, trained: Mapping[str, Tensor], folder: Path, *, with_adapter: bool):
    """Raise CheckpointError where the disk or the memory does not hold an export to `folder` and its check.

    skeleton: the base's model on the meta device, for its parameters' shapes.
    """
    sizes = {name: 4 * parameter.numel() for name, parameter in skeleton.named_parameters()}
    adapter = sum(sizes.get(name) or trained[name].nbytes for name in trained) if with_adapter else 0
    disk = adapter + sum(path.stat().st_size for path in [*shards_of(base), *_walk(side_files(base))])
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    again = "nothing is lost: `omnitune export` goes on from the run's checkpoint"
    if free < disk:
        raise CheckpointError(
            f"the export to '{folder}' takes {disk / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB free; remove "
            f"old checkpoints or exports there, or name another place with --out; {again}"
        )
    largest = 4 * max(tensor.numel() for tensor in StoredTensors(base).values())
    memory = _BESIDES + max(2.5 * largest, adapter + largest)
    available = available_memory()
    if available is not None and available < memory:
        raise CheckpointError(
            f"the export and its check take {memory / _GIB:.1f} GiB of memory, and {available / _GIB:.1f} GiB are "
            f"free; end other processes, or give the container more; {again}"
        )


def available_memory() -> int | None:
    """Bytes that this process may still take: of the machine, and of its control group; None where neither is told."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - int(held["anon"]))
    except (OSError, ValueError, KeyError):  # no such group, or no limit ("max")
        pass
    return min(found, default=None)
