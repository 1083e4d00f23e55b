"""Checkpoints: whole or not there, written while training goes on, checked before they are used.

step-000200/
  manifest.json              size and checksum of every other file; its presence says that all is there
  state.json                 where the run stands
  rank-00000.safetensors     each rank's part of the trained state (see `state`)
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from threading import Thread
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor

from train.engine.state import MASTER, SavedState
from train.errors import CheckpointError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
_POLL_S = 0.05
_FAULT = "fault"


class TrainedWeights(Mapping[str, Tensor]):
    """Float32 masters of a checkpoint's trained parameters, by name, read when they are asked for."""

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
    return SavedState(sorted(folder.glob("rank-*.safetensors")))


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json says."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def damage(folder: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing is; the work may be divided into `parts`."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"is not a complete checkpoint: it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError):
        return f"is damaged: {MANIFEST} cannot be read"
    for name in sorted(files)[part::parts]:
        file = folder / name
        if not file.is_file():
            return f"is damaged: {name} is gone"
        if file.stat().st_size != files[name]["bytes"]:
            return f"is damaged: {name} has {file.stat().st_size} bytes, and had {files[name]['bytes']}"
        if _checksum(file) != files[name]["blake2b"]:
            return f"is damaged: {name} does not have its checksum"
    return None


class Checkpoints:
    """The checkpoints/ folder of a run; each rank has an object of its own.

    keep_last: newest checkpoints kept, 0 = all.
    keep_best: figure of the evaluations by which the best one is kept too; "" = none.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, *, keep_last: int, keep_best: str = ""):
        self.folder, self.accelerator = folder, accelerator
        self.keep_last, self.keep_best = keep_last, keep_best
        self._writer: Thread | None = None
        self._fault: CheckpointError | None = None
        if accelerator.is_main_process:
            for left in folder.glob(".step-*"):  # by a run that was killed
                shutil.rmtree(left)
        accelerator.wait_for_everyone()

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint in the background; every rank must call it.

        tensors: this rank's part; nobody may change them any more.
        state: JSON values, the same on every rank, `step` among them.
        """
        self.finish()
        self._writer = Thread(target=self._write, args=(dict(tensors), dict(state)), daemon=True)
        self._writer.start()

    def check(self) -> None:
        """Raise CheckpointError if the last checkpoint could not be written."""
        if self._fault:
            raise self._fault

    def finish(self) -> None:
        """Wait until this rank's part is written (on the main process: the whole); raises CheckpointError."""
        if self._writer:
            self._writer.join()
            self._writer = None
        self.check()

    def _write(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        name = f"step-{state['step']:06d}"
        aside, final = self.folder / f".{name}", self.folder / name
        try:
            self._write_part(aside, tensors)
            if self.accelerator.is_main_process:
                self._complete(aside, final, state)
        except Exception as error:  # whatever it is: in a thread nobody would hear of it
            if self.accelerator.is_main_process:
                shutil.rmtree(aside, ignore_errors=True)
            self._fault = CheckpointError(
                f"checkpoint '{final}' cannot be written: {error}; the ones before are as they were. "
                "Make room or give another folder, and start again: the run goes on from the newest one"
            )

    def _write_part(self, aside: Path, tensors: dict[str, Tensor]) -> None:
        """Write this rank's tensors, and beside them their seal, or what went wrong: the main process waits for it."""
        rank = self.accelerator.process_index
        file = aside / f"rank-{rank:05d}.safetensors"
        seal = file.with_suffix(".json")
        try:
            aside.mkdir(parents=True, exist_ok=True)
            save_file(tensors, file)
            _write_json(seal, {file.name: _seal(file)})
        except Exception as error:
            with suppress(OSError):
                file.unlink(missing_ok=True)  # makes room for the next line, where a disk was full
                _write_json(seal, {_FAULT: f"rank {rank}: {error}"})
            raise

    def _complete(self, aside: Path, final: Path, state: dict[str, Any]) -> None:
        """On the main process: wait for the other ranks' parts, seal the whole, and give it its name."""
        _write_json(aside / STATE, state)
        files = {STATE: _seal(aside / STATE)}
        for rank in range(self.accelerator.num_processes):
            part = aside / f"rank-{rank:05d}.json"
            while not part.exists():  # a rank that ends without a word ends the whole run
                time.sleep(_POLL_S)
            sealed = json.loads(part.read_text(encoding="utf-8"))
            if _FAULT in sealed:
                raise CheckpointError(sealed[_FAULT])
            files |= sealed
            part.unlink()
        _write_json(aside / MANIFEST, {"files": files})
        _sync(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync(self.folder)
        self._forget_old()

    def _forget_old(self) -> None:
        found = self.complete()
        kept = set(found[-self.keep_last :]) | ({best} if (best := self._best(found)) else set())
        for old in found:
            if old not in kept:
                leaving = old.rename(old.with_name(f".{old.name}"))  # never half a checkpoint under its name
                shutil.rmtree(leaving)

    def _best(self, found: list[Path]) -> Path | None:
        """The checkpoint whose evaluation was best; the newest of equals."""
        if not self.keep_best:
            return None
        figures = {folder: read_state(folder)["evaluation"].get(self.keep_best) for folder in found}
        known = [folder for folder in reversed(found) if figures[folder] is not None]
        pick = min if is_better_low(self.keep_best) else max
        return pick(known, key=lambda folder: figures[folder], default=None)

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(
            (folder for folder in self.folder.glob("step-*") if (folder / MANIFEST).is_file()),
            key=lambda folder: int(folder.name.removeprefix("step-")),
        )

    def newest(self) -> Path:
        """The newest complete checkpoint, once it is written; every rank must call it."""
        self.finish()
        self.accelerator.wait_for_everyone()
        return self.complete()[-1]

    def find(self, resume: str) -> Path | None:
        """The checkpoint that `run.resume` means, checked; every rank must call it.

        Where `auto` finds a damaged one, it says so and takes the one before.
        """
        if resume == "never":
            return None
        candidates = self.complete()[::-1] if resume == "auto" else [Path(resume)]
        for folder in candidates:
            rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
            fault = next(filter(None, gather_object([damage(folder, part=rank, parts=ranks)])), None)
            if not fault:
                return folder
            if resume != "auto":
                raise CheckpointError(f"run.resume: '{folder}' {fault}")
            log.warning("'%s' %s; going on with the one before", folder, fault)
        if candidates:
            raise CheckpointError(
                f"none of the checkpoints in '{self.folder}' can be used; start anew with run.resume=never"
            )
        return None


def is_better_low(figure: str) -> bool:
    """Whether less of a figure is better: of losses and error rates."""
    return figure.removeprefix("eval/").partition("/")[0] in ("loss", "wer", "cer")


def _seal(file: Path) -> dict[str, Any]:
    """Put a file onto the disk, and tell its size and checksum."""
    _sync(file)
    return {"bytes": file.stat().st_size, "blake2b": _checksum(file)}


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a file that is whole as soon as it is there."""
    aside = file.with_suffix(".partial")
    aside.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
    _sync(aside)
    aside.rename(file)
