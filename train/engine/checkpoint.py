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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from math import isfinite, prod
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
_FOLDER = "checkpoints"
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
        if _checksum(folder / name) != files[name][1]:
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
    expected = {STATE, *(_rank_file(rank) for rank in ranks)}
    if lost := sorted(name for name in expected if not (folder / name).is_file()):
        return f"{lost[0]} is gone"
    if unlisted := sorted((expected | _rank_files(folder)) - files.keys(), reverse=True):
        return f"{MANIFEST} does not list {unlisted[0]}"
    if foreign := sorted(files.keys() - expected):
        return f"{MANIFEST} lists '{foreign[0]}', which is no part of a checkpoint of {len(ranks)} rank(s)"
    if _step_of(folder) not in (None, step):
        return f"its {STATE} is of step {step}"
    return None


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _rank_files(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("rank-*.safetensors")}


def _step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None for any other folder."""
    number = folder.name.removeprefix("step-")
    return int(number) if number != folder.name and number.isascii() and number.isdecimal() else None


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's checkpoints/, oldest first; what else lies there is left out."""
    found = {path: step for path in folder.glob("step-*") if (step := _step_of(path)) is not None}
    return sorted((path for path in found if (path / MANIFEST).is_file()), key=lambda path: found[path])


def newest_whole(folder: Path) -> Path:
    """The newest checkpoint of a run's folder that lacks nothing, or `folder` itself where it is a checkpoint.

    Checksums are not compared: `trained_weights` does. Raises CheckpointError where there is none.
    """
    if (folder / MANIFEST).is_file():
        return folder
    found = _first_whole(complete_checkpoints(folder / _FOLDER)[::-1], _lack)
    if not found:
        raise CheckpointError(f"'{folder}' is neither a complete checkpoint nor a run's folder that holds one")
    return found


def _first_whole(candidates: Iterable[Path], fault_of: Callable[[Path], str | None]) -> Path | None:
    """The first undamaged checkpoint; the damaged ones before it are named."""
    for folder in candidates:
        fault = fault_of(folder)
        if not fault:
            return folder
        log.warning("'%s' %s; going on with the one before", folder, fault)
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
        state: JSON values, the same on every rank, `step`, `world_size` and `evaluation` among them.
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
        file = aside / _rank_file(rank)
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
            part = (aside / _rank_file(rank)).with_suffix(".json")
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
        found = _first_whole(candidates, self._damage)
        if candidates and not found:
            raise CheckpointError(
                f"none of the checkpoints in '{self.folder}' can be used; start anew with run.resume=never"
            )
        return found

    def _damage(self, folder: Path) -> str | None:
        """`damage`, the work divided among the ranks."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return next(filter(None, gather_object([damage(folder, part=rank, parts=ranks)])), None)


def is_better(figure: str, value: float | None, *, than: float | None) -> bool:
    """Whether a value of an evaluation's figure is better: of losses and error rates the lower one.

    than: None = there is none yet. What is no number is never better.
    """
    if value is None or not isfinite(value):
        return False
    is_low = figure.removeprefix("eval/").partition("/")[0] in ("loss", "wer", "cer", "cut_answers")
    return than is None or (value < than if is_low else value > than)


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
