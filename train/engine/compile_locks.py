"""Locks under which torch compiles and loads extensions, DeepSpeed's operators among them.

A process that is killed meanwhile leaves its lock behind, and the next run would wait for it for ever, without a word.
"""

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

COMPILATION_S = 300
"""Age at which a lock is nobody's: another machine that shares the folder may hold it, for as long as it compiles."""


def drop_stale_locks(limit_s: float = COMPILATION_S) -> None:
    """Remove locks that no process of this machine has open, once they are `limit_s` old."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        with suppress(FileNotFoundError):  # it was released
            while not _is_open(lock):
                age = time.time() - lock.stat().st_mtime
                if age > limit_s:
                    log.warning("removed '%s', which a killed process left behind", lock)
                    lock.unlink()
                    break
                log.warning("'%s' may be held on another machine; waiting %.0f s for it", lock, limit_s - age)
                time.sleep(min(limit_s - age, 10) + 0.1)


def _is_open(file: Path) -> bool:
    """Whether a process of this machine has the file open, as torch has a lock that it holds."""
    path = str(file.resolve(strict=True))
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(opened.path == path for opened in process.open_files()):
                return True
    return False
