"""The launchers of several machines keep an eye on each other: where one ends, all end, with the same message."""

import os
import signal
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore

from train.launcher.ranks import signal_ranks

BEAT_S = 1.0
SILENCE_S = 30
"""Seconds after which a machine that says nothing counts as gone."""

_JOIN_S = 3600
_FAREWELL_S = 10
_FAILURE = "omnitune/failure"


class MachineGone(Exception):
    """Another machine of the run failed or went silent; the message is for the user."""


class Machines:
    """This machine among those of a run; a context in whose body MachineGone may be raised at any time.

    They talk through the store that torch's rendezvous keeps on machine 0. NCCL may wait long for a machine that is
    gone, and gloo for one that was unplugged; neither knows why.
    """

    def __init__(self, address: str, port: int, *, machine: int, count: int):
        self.address, self.port, self.machine, self.count = address, port, machine, count
        self._others = [other for other in range(count) if other != machine]
        self._failure = self._news = ""
        self._wake, self._leaving = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._talk, daemon=True)

    def __enter__(self) -> "Machines":
        if self._others:
            signal.signal(signal.SIGALRM, self._on_alarm)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._others:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            self._leaving.set()
            self._wake.set()
            self._thread.join(_FAREWELL_S)

    def tell(self, failure: str) -> None:
        """Why this machine ends: the others end with these words, unless another was first."""
        self._failure = failure

    def wait_for_news(self) -> None:
        """Give the machine that failed first the time to say so (it then ends this wait by MachineGone)."""
        if self._others:
            time.sleep(3 * BEAT_S)

    def _on_alarm(self, *_: object) -> None:
        signal_ranks(signal.SIGKILL)  # they wait for the machine that is gone, and would not end when asked
        raise MachineGone(self._news or self._gone(0))

    @staticmethod
    def _gone(machine: int) -> str:
        return (
            f"error: machine {machine} is gone: it ended without a word, or has not answered for {SILENCE_S} s; "
            "see its own output"
        )

    def _end(self, news: str) -> None:
        self._news = news
        os.kill(os.getpid(), signal.SIGALRM)

    def _talk(self) -> None:
        try:
            store = self._joined(is_master=False)
            if self.machine == 0:  # torch's server runs in this process, and would go with its agent
                store = self._joined(is_master=True)
            self._keep_talking(store)
            self._take_leave(store)
        except RuntimeError:  # the store went with machine 0
            self._end(self._gone(0))

    def _joined(self, *, is_master: bool) -> TCPStore:
        """The store; is_master: share in its server, which must run in this process, and keep that alive."""
        return TCPStore(
            self.address,
            self.port,
            is_master=is_master,
            wait_for_workers=False,
            timeout=timedelta(seconds=_JOIN_S),
            multi_tenant=True,
        )

    def _keep_talking(self, store: TCPStore) -> None:
        heard: dict[int, tuple[bytes, float]] = {}
        beats = 0
        while not self._leaving.is_set():
            signal.alarm(SILENCE_S)  # ends the run where the store itself no longer answers
            beats += 1
            store.set(f"omnitune/beat/{self.machine}", str(beats))
            if store.check([_FAILURE]):
                self._end(store.get(_FAILURE).decode())
                return
            now = time.monotonic()
            for other in self._others:
                if not store.check([f"omnitune/beat/{other}"]):  # not there yet: torch's rendezvous waits for it
                    continue
                beat = store.get(f"omnitune/beat/{other}")
                if other not in heard or heard[other][0] != beat:
                    heard[other] = beat, now
                elif now - heard[other][1] > SILENCE_S:
                    self._end(self._gone(other))
                    return
            self._wake.wait(BEAT_S)

    def _take_leave(self, store: TCPStore) -> None:
        """Machine 0, which keeps the store, is the last to go."""
        self._leaving.wait()
        signal.alarm(0)
        if self._failure:
            store.compare_set(_FAILURE, "", self._failure)
        store.set(f"omnitune/left/{self.machine}", "")
        if self.machine == 0:
            store.wait([f"omnitune/left/{other}" for other in self._others], timedelta(seconds=_FAREWELL_S))
