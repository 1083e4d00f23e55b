"""Work that may take long says what it is doing."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

log = logging.getLogger(__name__)

SILENCE_S = 5.0
"""Seconds that work may take without a word."""


@contextmanager
def announced(what: str, silence_s: float = SILENCE_S) -> Iterator[None]:
    """Log `what` if the block takes longer than `silence_s` seconds, and then how long it took."""
    began = time.monotonic()
    timer = Timer(silence_s, log.info, ["%s ...", what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
    if (seconds := time.monotonic() - began) > silence_s:
        log.info("%s: done in %.0f s", what, seconds)
