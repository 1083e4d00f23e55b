"""Weights & Biases: online where a key is at hand, else offline; never a prompt, never the end of a run."""

import logging
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config import TrackerOptions
from train.engine.evaluator import Evaluation
from train.engine.observers import StepReport

log = logging.getLogger(__name__)

_PATIENCE_S = 60
"""Seconds that W&B may take to start online; then it records offline."""

_UPLOAD_S = 300
"""Seconds that the end of a run waits for what is not uploaded yet; it stays on the disk for `wandb sync`."""


class WandbTracker:
    """Sends each step and evaluation to W&B; once that fails, it says so, and the run goes on untracked."""

    def __init__(self, options: TrackerOptions, *, name: str, folder: Path, config: dict[str, Any]):
        self._run: Any = None
        self._try(lambda: self._start(options, name, folder, config))

    def on_step(self, report: StepReport) -> None:
        """Log the step."""
        values = report.to_dict()
        step = int(values.pop("step"))
        self._try(lambda: self._run and self._run.log(values, step=step))

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Log the evaluation with its step."""
        self._try(lambda: self._run and self._run.log(evaluation.values, step=step))

    def close(self, *, failed: bool) -> None:
        """Finish the run."""
        self._try(lambda: self._run and self._run.finish(exit_code=int(failed)))

    def _try(self, what: Callable[[], object]) -> None:
        try:
            what()
        except Exception as error:  # whatever it is: a tracker is no reason to lose a run
            self._run = None
            log.warning("W&B failed (%s); the run goes on untracked, metrics.jsonl has everything", error)

    def _start(self, options: TrackerOptions, name: str, folder: Path, config: dict[str, Any]) -> None:
        import wandb  # which reads the environment when it is imported, and may find it wrong

        arguments: dict[str, Any] = {
            "project": options.project,
            "tags": options.tags,
            "name": name,
            "dir": str(folder),
            "id": _run_id(folder / "wandb" / "run_id"),
            "resume": "allow",
            "config": config,
        }
        mode = os.environ.get("WANDB_MODE") or "online"
        if mode == "online" and not has_key():
            mode = "offline"
            level = logging.WARNING if "WANDB_MODE" in os.environ else logging.INFO
            log.log(
                level,
                "W&B has no API key, so it records offline; `wandb sync %s/wandb/offline-run-*` uploads",
                folder,
            )
        try:
            self._run = _init(wandb, mode, arguments)
        except Exception as error:
            if mode != "online":
                raise
            wandb.teardown()  # else the id counts as in use
            self._run = _init(wandb, "offline", arguments)
            log.warning("W&B could not be reached (%s); it records offline", error)


def _init(wandb: Any, mode: str, arguments: dict[str, Any]) -> Any:
    settings = wandb.Settings(
        console="off", silent=mode != "online", init_timeout=_PATIENCE_S, finish_timeout=_UPLOAD_S
    )
    return wandb.init(mode=mode, settings=settings, **arguments)


def _run_id(file: Path) -> str:
    """W&B's name for the run in this folder, so that a resumed run is the same run there."""
    if file.exists():
        held = file.read_bytes().decode(errors="replace")
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", held):
            return held
        log.warning("'%s' holds no id of a run; W&B gets a new one, and shows a new run", file)
    file.parent.mkdir(exist_ok=True)
    file.write_text(uuid.uuid4().hex[:8])
    return file.read_text()


def has_key() -> bool:
    """Whether W&B finds an API key."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return wandb.login(prompt=False)
    except Exception:  # there is one, and it cannot be verified
        return True
