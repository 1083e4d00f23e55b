"""train/main.py, but one rank fails in its second step, as FAILURE says: fault, error, or kill; on rank 1."""

import os
import runpy
import signal
from typing import Any

from train.engine.step import TrainStep
from train.errors import OmniTuneError

_step = TrainStep.__call__
_calls = 0


def _failing(self: TrainStep, *args: Any, **kwargs: Any) -> Any:
    global _calls
    _calls += 1
    if _calls == 2 and os.environ["RANK"] == "1":
        if os.environ["FAILURE"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"fault": OmniTuneError, "error": KeyError}[os.environ["FAILURE"]]("the disk of rank 1 is full")
    return _step(self, *args, **kwargs)


if __name__ == "__main__":
    TrainStep.__call__ = _failing  # type: ignore[method-assign]
    runpy.run_path("train/main.py", run_name="__main__")
