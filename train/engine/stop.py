"""A polite end: the signals by which schedulers, spot machines and Ctrl-C ask a run to stop."""

import logging
import os
import signal
import time
from types import FrameType

log = logging.getLogger(__name__)

_ECHO_S = 1.0
"""Seconds in which the same request may reach a process twice: from a scheduler, and passed on by the launcher."""


class StopRequest:
    """Whether SIGTERM or SIGINT came: the run then saves, after the step or the batch of an evaluation at hand.

    A second one ends it at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0

    def listen(self) -> None:
        """Take the signals over; only the main thread of a process may."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            if time.monotonic() - self._since > _ECHO_S:
                os._exit(128 + number)
            return
        self.requested, self._since = True, time.monotonic()
        log.warning(
            "%s: the run saves after this step, or this batch of an evaluation, and stops; "
            "a second signal ends it at once",
            signal.Signals(number).name,
        )
