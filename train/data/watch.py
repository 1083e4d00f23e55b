"""An eye on the workers: which record each one decodes, since when; one that takes too long is killed."""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.utils.data import get_worker_info

_RECORD, _SINCE, _PROCESS = range(3)

_GRACE_S = 20.0
"""Seconds that a worker goes on after SIGTERM."""


class Watch:
    """Shared between this process, which watches, and its workers, which say what they do.

    workers: 0 = records are decoded in this process, and nothing is watched.
    limit_s: seconds that a record may take.
    """

    def __init__(self, workers: int, limit_s: float):
        self.limit_s = limit_s
        # float64 holds indices, process numbers and the clock exactly enough; -1 = idle
        self._now = torch.full((workers, 3), -1.0, dtype=torch.float64).share_memory_()
        self._owner = os.getpid()
        self._killed: set[int] = set()
        self._end = threading.Event()
        if workers:
            threading.Thread(target=self._kill_the_slow, daemon=True).start()

    @contextmanager
    def __call__(self, record: int) -> Iterator[None]:
        """Entered by a worker around the decoding of a record."""
        worker = get_worker_info()
        if worker is None:
            yield
            return
        mine = self._now[worker.id]
        mine[_SINCE], mine[_PROCESS] = time.monotonic(), os.getpid()
        mine[_RECORD] = record
        try:
            yield
        finally:  # a record that is refused is done with too: an idle worker is not slow
            mine[_RECORD] = -1

    def lost_records(self) -> dict[int, str]:
        """The records at which workers were killed or died, and what became of them."""
        lost = {}
        for record, _, process in self._now.tolist():
            if record >= 0 and not _is_alive(int(process)):
                slow = int(process) in self._killed
                reason = f"took over {self.limit_s:g} s to decode" if slow else "crashed the decoding process"
                lost[int(record)] = f"its media {reason}; replace or remove them"
        return lost

    def close(self) -> None:
        """Stop watching."""
        self._end.set()

    def _kill_the_slow(self) -> None:
        while not self._end.wait(min(1.0, self.limit_s / 4)):
            for record, since, process in self._now.tolist():
                if record >= 0 and time.monotonic() - since > self.limit_s and _is_alive(int(process)):
                    self._killed.add(int(process))
                    with suppress(ProcessLookupError):
                        os.kill(int(process), signal.SIGKILL)

    def begin(self, worker: int) -> None:
        """Called in each new worker: end it when the process that watches ends, however that happens.

        A worker's parent is the fork server, which waits for its workers: nobody else would end either.
        Signals that ask the whole run to stop reach the workers too, which are needed for the step at hand.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: threading.Timer(_GRACE_S, os._exit, [1]).start())
        threading.Thread(target=_end_with, args=(self._owner,), daemon=True).start()

    def __getstate__(self) -> dict:
        return {"limit_s": self.limit_s, "_now": self._now, "_owner": self._owner}


def _end_with(process: int) -> None:
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(process)], [], [])
    os._exit(1)


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
