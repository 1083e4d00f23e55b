"""One run a folder."""

import fcntl
from pathlib import Path
from typing import IO

from train.errors import OmniTuneError
from train.run_folder import RunFolder

_held: dict[Path, IO[str]] = {}


def lock(folder: Path) -> None:
    """Keep `folder` for this process until it ends, however that happens.

    Raises OmniTuneError where another process keeps it. A process may lock a folder again.
    """
    place = folder.resolve()
    if place in _held:
        return
    file = RunFolder(folder).lock.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise OmniTuneError(
            f"run.dir: another run is writing to '{folder}'; wait for it, or name another folder"
        ) from None
    _held[place] = file
