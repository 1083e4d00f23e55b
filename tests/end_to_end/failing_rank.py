"""train/main.py, but rank 1, or the one process of a run without ranks, fails as FAILURE says: by a fault, an error, a
lack of memory or SIGKILL in its second step, or in a save.
"""

import os
import runpy
import signal
from typing import Any

import torch

from train.engine import checkpoint
from train.engine.step import TrainStep
from train.errors import OmniTuneError

_step = TrainStep.__call__
_calls = 0


def _failing(self: TrainStep, *args: Any, **kwargs: Any) -> Any:
    global _calls
    _calls += 1
    if _calls == 2 and os.environ.get("RANK", "1") == "1" and os.environ["FAILURE"] != "save":
        if os.environ["FAILURE"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["FAILURE"] == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has none.")
        raise {"fault": OmniTuneError, "error": KeyError}[os.environ["FAILURE"]]("the disk of rank 1 is full")
    return _step(self, *args, **kwargs)


def _not_saving(*_: Any) -> None:
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    if os.environ["FAILURE"] == "save" and os.environ["RANK"] == "1":
        checkpoint.save_file = _not_saving  # type: ignore[assignment]
    TrainStep.__call__ = _failing  # type: ignore[method-assign]
    runpy.run_path("train/main.py", run_name="__main__")
