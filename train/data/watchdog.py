"""The watchdog of the workers: which record each one works on, since when; one that takes too long is killed."""

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

_RECORD, _SINCE, _PROCESS, _BORN = range(4)

_GRACE_S = 20.0
"""Seconds that a worker goes on after SIGTERM."""


class Watchdog:
    """Shared between this process and its workers, which note in it what they work on.

    workers: 0 = records are read in this process, without a watchdog.
    limit_s: seconds that a record may take.
    """

    def __init__(self, workers: int, limit_s: float):
        self.limit_s = limit_s
        # float64 holds indices, process numbers and clocks exactly enough; -1 = no record, not begun
        self._now = torch.full((workers, 4), -1.0, dtype=torch.float64).share_memory_()
        self._owner = os.getpid()
        self._killed: dict[int, int] = {}  # by process, the record for which it was killed
        self._end = threading.Event()
        if workers:
            threading.Thread(target=self._kill_the_slow, daemon=True).start()

    @contextmanager
    def __call__(self, record: int) -> Iterator[None]:
        """Entered by a worker around the work on a record."""
        worker = get_worker_info()
        if worker is None:
            yield
            return
        mine = self._now[worker.id]
        mine[_SINCE] = time.monotonic()
        mine[_RECORD] = record
        try:
            yield
        finally:  # a record that is refused is done with too: an idle worker is not slow
            mine[_RECORD] = -1

    def is_one_gone(self) -> bool:
        """Whether a worker was killed or died."""
        return any(process >= 0 and not _is_alive(process, born) for _, _, process, born in self._now.tolist())

    def lost_records(self) -> dict[int, str]:
        """The records at which workers were killed or died, and what became of them."""
        lost = {}
        for record, _, process, born in self._now.tolist():
            if record >= 0 and not _is_alive(process, born):
                slow = self._killed.get(process) == record
                reason = f"took over {self.limit_s:g} s to decode" if slow else "crashed the decoding process"
                lost[int(record)] = f"its media {reason}; replace or remove them"
        return lost

    def close(self) -> None:
        """Stop, and end the workers that have not ended yet."""
        self._end.set()
        for _, _, process, born in self._now.tolist():
            _kill(process, born)

    def _kill_the_slow(self) -> None:
        while not self._end.wait(min(1.0, self.limit_s / 4)):
            for record, since, process, born in self._now.tolist():
                if record >= 0 and time.monotonic() - since > self.limit_s and _is_alive(process, born):
                    self._killed[process] = record
                    _kill(process, born)

    def begin(self, worker: int) -> None:
        """Called in each new worker: end it when the process that owns the watchdog ends, however that happens.

        A worker's parent is the fork server, which waits for its workers: nobody else would end either.
        Signals that ask the whole run to stop reach the workers too, which are needed for the step at hand.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: threading.Timer(_GRACE_S, os._exit, [1]).start())
        threading.Thread(target=_end_with, args=(self._owner,), daemon=True).start()
        mine = self._now[worker]
        mine[_BORN] = _born(os.getpid())
        mine[_PROCESS] = os.getpid()

    def __getstate__(self) -> dict:
        return {"limit_s": self.limit_s, "_now": self._now, "_owner": self._owner}


def _end_with(process: int) -> None:
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(process)], [], [])
    os._exit(1)


def _kill(process: float, born: float) -> None:
    if _is_alive(process, born):
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def _is_alive(process: float, born: float) -> bool:
    """Whether the process of that number is still the one that began then: numbers are given again."""
    return process >= 0 and _born(int(process)) == born


def _born(process: int) -> float:
    """When a process began, in the kernel's ticks; -1 if it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return -1.0
    return -1.0 if fields[0] in "ZX" else float(fields[19])
