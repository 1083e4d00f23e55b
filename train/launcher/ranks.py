"""The processes that this launcher started."""

from contextlib import suppress

import psutil


def signal_ranks(number: int) -> None:
    """Send a signal to all ranks of this machine that still run."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            child.send_signal(number)
