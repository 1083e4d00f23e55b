"""Work on records in processes of its own: results in order, whatever becomes of a process."""

import logging
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from train.data.watchdog import Watchdog
from train.errors import OmniTuneError

log = logging.getLogger(__name__)

R = TypeVar("R")

_TRIES = 2
"""How often a record may be at hand when its worker ends: the first time, something else may have ended it."""

_FRUITLESS = 3
"""How often workers may end in a row while they work on no record and before they have a result."""

_NOTICE_S = 2.0
"""Seconds in which a process that is ending has ended: its connections close first."""


_PRELOADED = ("train.data.", "train.families.")
"""Of these, what this process has imported is imported once in the server process, not anew by each of its workers."""


@dataclass(frozen=True)
class Workers:
    """The processes that read records.

    count: 0 = the work is done in this process, without a watchdog.
    prefetch: items that each process keeps ready.
    limit_s: seconds that a record may take; then its process is killed.
    """

    count: int = 0
    prefetch: int = 2
    limit_s: float = 60.0


UNWATCHED = Workers()
"""None: records are read in this process."""


@dataclass
class _Jobs(Dataset, Generic[R]):
    job: Callable[[Any, Watchdog], R]
    watch: Watchdog

    def __getitem__(self, item: Any) -> R:
        return self.job(item, self.watch)


class Results(Generic[R]):
    """What `job` makes of each item, in order, worked out ahead in worker processes, which start with `iter`.

    The processes come from a server process: forked from this one, with its threads, they sometimes hang for ever.
    Where one ends (killed by the watchdog or from outside, or crashed), all start anew from the result that is next.
    The record it was at is tried once more, and given up when a worker ends at it again.

    job: takes an item and a Watchdog, entered with a record's index around the work on it; is pickled.
    items_from: the items that are left after so many results.
    given_up: takes the records that were given up, and why; `job` must hold it, and skip them.
    """

    def __init__(
        self,
        job: Callable[[Any, Watchdog], R],
        items_from: Callable[[int], Iterable[Any]],
        given_up: dict[int, str],
        workers: Workers,
        *,
        pin_memory: bool = False,
    ):
        self.job, self.items_from, self.given_up = job, items_from, given_up
        self.workers, self.pin_memory = workers, pin_memory
        self._losses: Counter[int] = Counter()
        self._fruitless = 0

    def __iter__(self) -> Iterator[R]:
        return self._from(*self._begin(0))

    def _from(self, watch: Watchdog, results: Iterator[R] | None) -> Iterator[R]:
        done, nothing = 0, object()
        try:
            while True:
                try:
                    result: Any = next(results, nothing)  # type: ignore[arg-type]
                except Exception as error:
                    if not self._is_loss(error, watch):
                        raise
                    self._note_losses(watch, error)
                else:
                    if result is nothing:
                        return
                    done, self._fruitless = done + 1, 0
                    yield result
                    continue
                results = None  # ends the other workers
                watch.close()
                watch, results = self._begin(done)
        finally:
            results = None
            watch.close()

    def _is_loss(self, error: Exception, watch: Watchdog) -> bool:
        """Whether the error came of a worker's end, and not from `job`."""
        if not self.workers.count:
            return False
        if str(error).startswith("DataLoader worker"):
            return True
        deadline = time.monotonic() + _NOTICE_S
        while isinstance(error, OSError | EOFError) and not watch.is_one_gone() and time.monotonic() < deadline:
            time.sleep(0.01)
        return watch.is_one_gone()

    def _note_losses(self, watch: Watchdog, error: Exception) -> None:
        lost = watch.lost_records()
        if not lost:
            self._count_fruitless(error)
        for record, reason in lost.items():
            self._losses[record] += 1
            if self._losses[record] >= _TRIES:
                self.given_up[record] = reason
        log.warning("a process that reads records ended; starting anew")

    def _count_fruitless(self, error: Exception) -> None:
        self._fruitless += 1
        if self._fruitless > _FRUITLESS:
            raise OmniTuneError(
                f"the processes that read records end before they have read any ({error}); see what ends them (memory, "
                "a limit of the machine), or set data.workers=0"
            ) from error

    def _begin(self, done: int) -> tuple[Watchdog, Iterator[R]]:
        while True:
            try:
                return self._start(done)
            except (ConnectionError, EOFError) as error:  # one ended while it was told what to do
                self._count_fruitless(error)

    def _start(self, done: int) -> tuple[Watchdog, Iterator[R]]:
        multiprocessing.set_forkserver_preload(sorted(name for name in sys.modules if name.startswith(_PRELOADED)))
        count = self.workers.count
        watch = Watchdog(count, self.workers.limit_s)
        loader = DataLoader(
            _Jobs(self.job, watch),
            batch_size=None,
            sampler=self.items_from(done),  # type: ignore[arg-type]
            num_workers=count,
            prefetch_factor=self.workers.prefetch if count else None,
            worker_init_fn=watch.begin if count else None,
            multiprocessing_context="forkserver" if count else None,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # the global one is dropout's, and a resumed run makes one loader more
        )
        return watch, iter(loader)
