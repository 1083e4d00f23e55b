"""A rank's failure: told by the rank in the error file that torch's launchers give it, and read again by ours."""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

STOPPED = 75
"""Exit code of a run that saved and stopped because it was asked to (EX_TEMPFAIL): start it again, and it goes on."""

_FILE = "TORCHELASTIC_ERROR_FILE"


@contextmanager
def report_failure(explain: Callable[[Exception], str | None]) -> Iterator[None]:
    """Around all that a process does: a failure is told where it is read best.

    explain: what to say of an error that the user can put right, or None for any other, which keeps its traceback.

    Without a launcher the process ends as Python does. Under one it leaves its account in the error file and ends at
    once: an orderly exit would wait for other ranks, which wait for this one.
    """
    try:
        yield
    except Exception as error:
        fault = explain(error)
        file = os.environ.get(_FILE)
        if file is None:
            if fault is None:
                raise
            sys.exit(f"error: {fault}")
        text = traceback.format_exc().rstrip() if fault is None else f"error: {fault}"
        ours = {"time": time.time(), "is_fault": fault is not None, "lost_peer": _lost_peer(error)}
        # torchrun takes the earliest for the cause: a consequence must not come first.
        about = {"py_callstack": text, "timestamp": int(time.time()) + 60 * ours["lost_peer"]}
        with open(file, "w", encoding="utf-8") as out:  # noqa: PTH123
            json.dump({"message": {"message": text.splitlines()[-1], "extraInfo": about | ours}}, out)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _lost_peer(error: BaseException) -> bool:
    """Whether communication failed: most likely since another rank ended, whose own failure tells more."""
    return any(kind.__name__ == "DistError" for kind in type(error).__mro__) or "gloo/transport" in str(error)


@dataclass(frozen=True)
class Failure:
    """Why a rank ended; `text` is for the user."""

    text: str
    lost_peer: bool


def first_failure(failures: Mapping[int, Any], *, name_host: bool) -> Failure:
    """The failure that brought about the others.

    failures: torch's ProcessFailure of each rank.
    name_host: say on which machine it was.
    """
    rank, failure = min(failures.items(), key=lambda item: _order(item[1]))
    told = _told(failure)
    where = f"rank {rank} on {socket.gethostname()}" if name_host else f"rank {rank}"
    if not told:
        return Failure(f"error: {where} {_ending(failure)}", lost_peer=False)
    text = told["py_callstack"]
    if told["lost_peer"]:
        text += f"\nerror: {where} lost the connection to another rank, which has ended; its own output may say why"
    elif not told["is_fault"]:
        text += f"\nerror: {where} failed first, with the error above"
    elif name_host:
        text += f"\n({where})"
    return Failure(text, told["lost_peer"])


def _told(failure: Any) -> dict[str, Any]:
    message = failure.error_file_data["message"]
    return message["extraInfo"] if isinstance(message, dict) else {}


def _order(failure: Any) -> tuple[int, float]:
    """Causes before consequences, then by time; last, those that the launcher itself ended."""
    told = _told(failure)
    if told:
        return int(told["lost_peer"]), told["time"]
    if failure.exitcode == -signal.SIGTERM:
        return 2, failure.timestamp
    return int(failure.exitcode == -signal.SIGABRT), failure.timestamp  # gloo may abort where a peer is gone


def _ending(failure: Any) -> str:
    if failure.exitcode == -signal.SIGKILL:
        return "was killed (SIGKILL), as the system does when memory runs out; see `dmesg` and memory/peak_gib"
    if failure.exitcode < 0:
        return f"was ended by {signal.Signals(-failure.exitcode).name}; its output above may say why"
    return f"ended with exit code {failure.exitcode}; its output above says why"
