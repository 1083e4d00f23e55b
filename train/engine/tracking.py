"""Weights & Biases: online where a key is at hand, else offline; never a prompt, never a crash."""

import logging
import os
import uuid
from pathlib import Path
from typing import Any

import wandb

from train.config import TrackerOptions
from train.engine.metrics import StepReport

log = logging.getLogger(__name__)


class WandbTracker:
    """Sends each step and evaluation to W&B."""

    def __init__(self, options: TrackerOptions, *, name: str, folder: Path, config: dict[str, Any]):
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        if mode == "offline":
            log.info(
                "W&B has no API key, so it records offline; `wandb sync %s/wandb/offline-run-*` uploads",
                folder,
            )
        arguments: dict[str, Any] = {
            "project": options.project,
            "tags": options.tags,
            "name": name,
            "dir": str(folder),
            "id": _run_id(folder / "wandb" / "run_id"),
            "resume": "allow",
            "config": config,
        }
        try:
            self._run = self._start(mode, arguments)
        except Exception as error:  # a tracker's trouble is no reason to lose a run
            log.warning("W&B could not be reached (%s); it records offline", error)
            self._run = self._start("offline", arguments)

    @staticmethod
    def _start(mode: str, arguments: dict[str, Any]) -> Any:
        settings = wandb.Settings(console="off", silent=mode != "online", init_timeout=60)
        return wandb.init(mode=mode, settings=settings, **arguments)  # type: ignore[arg-type]

    def on_step(self, report: StepReport) -> None:
        """Log the step."""
        values = report.to_dict()
        self._run.log(values, step=int(values.pop("step")))

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Log the evaluation with its step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _run_id(file: Path) -> str:
    """W&B's name for the run in this folder, so that a resumed run is the same run there."""
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(uuid.uuid4().hex[:8])
    return file.read_text()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(wandb.api.api_key)
    except Exception:
        return False
