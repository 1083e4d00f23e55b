"""Checkpoints: whole or not there, written while training goes on, checked before they are used.

What they hold: `export.checkpoint_reader`.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor

from train.engine.gain import is_better
from train.errors import CheckpointError
from train.export.checkpoint_reader import (
    MANIFEST,
    STATE,
    checksum,
    complete_checkpoints,
    damage,
    first_whole,
    rank_file,
    read_state,
)

log = logging.getLogger(__name__)

_POLL_S = 0.05
_FAULT = "fault"


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

    def save(self, tensors: Callable[[], Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint in the background; every rank must call it.

        tensors: copies this rank's part, which nobody else changes; called once the one before is written, since two
        copies of a large model would not fit into host memory.
        state: JSON values, the same on every rank, `step` among them.
        """
        self.finish()
        self._writer = Thread(target=self._write, args=(dict(tensors()), dict(state)), daemon=True)
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
        file = aside / rank_file(rank)
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
            part = (aside / rank_file(rank)).with_suffix(".json")
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
        """The checkpoint whose evaluation was best; the first of equals."""
        best, value = None, None
        for folder in found if self.keep_best else ():
            with suppress(CheckpointError):  # a damaged one
                figure = read_state(folder).get("evaluation", {}).get(self.keep_best)
                if is_better(self.keep_best, figure, than=value):
                    best, value = folder, figure
        return best

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return complete_checkpoints(self.folder)

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
        if resume != "auto":
            if fault := self._damage(Path(resume)):
                raise CheckpointError(f"run.resume: '{resume}' {fault}")
            return Path(resume)
        candidates = self.complete()[::-1]
        found = first_whole(candidates, self._damage)
        if candidates and not found:
            raise CheckpointError(
                f"none of the checkpoints in '{self.folder}' can be used; start anew with run.resume=never"
            )
        return found

    def _damage(self, folder: Path) -> str | None:
        """`damage`, the work divided among the ranks."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return next(filter(None, gather_object([damage(folder, part=rank, parts=ranks)])), None)


def _seal(file: Path) -> dict[str, Any]:
    """Put a file onto the disk, and tell its size and checksum."""
    _sync(file)
    return {"bytes": file.stat().st_size, "blake2b": checksum(file)}


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
