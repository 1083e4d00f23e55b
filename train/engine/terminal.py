"""What a run prints: messages with time and level, and progress bars below them."""

import logging
import sys
from io import StringIO

from tqdm import tqdm

log = logging.getLogger(__name__)

_LINES_EVERY_S = 20.0
"""Seconds between two lines of progress where the output is not a terminal."""

_UP = "\x1b[A"
"""Moves the cursor, to where another bar stands."""


class Terminal(logging.Handler):
    """Prints messages to stderr, above any progress bar that is drawn there."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _Lines(StringIO):
    """Logs each state of a progress bar as a line: in a file, a bar would be written over and over."""

    def write(self, text: str) -> int:
        if line := text.replace(_UP, "").strip():
            log.info("%s", line)
        return len(text)


def progress_bar(what: str, total: int, *, done: int = 0, delay_s: float = 0.0, hidden: bool = False) -> tqdm:
    """A bar that counts `what`, with the time passed and the time left; every 20 s a line where there is no terminal.

    done: how many are done before it starts. delay_s: seconds before it appears.
    """
    is_terminal = sys.stderr.isatty()
    bar = "|{bar:20}| " if is_terminal else ""
    return tqdm(
        total=total,
        initial=done,
        delay=delay_s,
        disable=hidden,
        bar_format=f"{what} {{n_fmt}} of {{total_fmt}} {bar}{{elapsed}} passed, {{remaining}} left{{postfix}}",
        dynamic_ncols=is_terminal,
        mininterval=0.2 if is_terminal else _LINES_EVERY_S,
        file=None if is_terminal else _Lines(),
    )
