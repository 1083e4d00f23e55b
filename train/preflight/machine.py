"""The machine that a run is to begin on: versions, devices, room, rights, ports, the tracker."""

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import torch

from train.config import Options
from train.engine.environment import versions
from train.engine.tracking.to_wandb import has_key
from train.export.base_folder import available_memory

_PORT = 29500
"""Where ranks meet if MAIN_PORT does not say it."""


def look_at_machine(options: Options) -> tuple[dict[str, Any], list[str], list[str]]:
    """What the machine has, what would stop the run, and what is only worth knowing."""
    faults, notes = [], []
    place = _existing(Path(options.run.dir))
    memory = available_memory()
    about: dict[str, Any] = {
        "versions": versions(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "memory_free_gib": round(memory / 2**30, 1) if memory else None,
        "disk_free_gb": round(shutil.disk_usage(place).free / 1e9, 1),
    }
    if not os.access(place, os.W_OK):
        faults.append(f"run.dir: '{options.run.dir}' cannot be written to: '{place}' is not yours; name another folder")
    if not about["devices"]:
        notes.append("torch sees no GPU here: training would run on the CPU")
    if options.data.cache is None:
        notes.append("data.cache is null, so every start measures all records again, and so does the doctor")
    elif not os.access(_existing(Path(options.data.cache).expanduser()), os.W_OK):
        notes.append(f"data.cache: '{options.data.cache}' cannot be written to, so every start measures again")
    port = int(os.environ.get("MAIN_PORT", _PORT))
    if not _is_free(port):
        notes.append(f"port {port} is taken; with several machines, choose another by MAIN_PORT")
    if options.tracker.wandb and not has_key():
        notes.append("tracker=wandb has no key here, so W&B records offline; `wandb login`, or tracker=none")
    return about, faults, notes


def _existing(path: Path) -> Path:
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
