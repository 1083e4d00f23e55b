"""Weights & Biases: online where a key is at hand, else offline; never a prompt."""

import logging
import os
import re
import uuid
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.data.audio import SAMPLE_RATE, load_clip
from train.engine.tracking.tracker import Answers, Figures, TrackedRun, kept_id
from train.schema import KINDS, Kind, MediaSource, Record, file_of

log = logging.getLogger(__name__)

_PATIENCE_S = 60
"""Seconds that W&B may take to start online; then it records offline."""

_UPLOAD_S = 300
"""Seconds that the end of a run waits for what is not uploaded yet; it stays on the disk for `wandb sync`."""

_ROWS = 64
"""Answers that a table shows, spread evenly over the records."""

_TABLE = "eval/answers"


class WandbTracker:
    """Sends figures and tables of answers, with images and clips, to W&B.

    A resumed run is the same run there. Online, W&B knows which steps it has, and takes later ones. Offline, each life
    of a run leaves a folder, and `wandb sync` would show steps of several: so the newest holds the whole run, and those
    before it are moved to wandb/replaced/.
    """

    def __init__(self, run: TrackedRun):
        import wandb  # which reads the environment when it is imported, and may find it wrong

        self._wandb: Any = wandb
        self._tracked = run
        self._run = self._start(run)
        self._first = self._run.step
        for step, figures in run.history():
            self.log(step, figures)
            if "eval/loss" in figures:
                self.log_answers(step, run.answers(step))

    def log(self, step: int, figures: Figures) -> None:
        """Send the figures of a step that W&B does not have."""
        if step >= self._first:
            self._run.log(dict(figures), step=step)

    def log_answers(self, step: int, answers: Answers) -> None:
        """Send a table of answers beside their references, with what was seen and heard."""
        if step < self._first or not answers:
            return
        chosen = np.linspace(0, len(answers) - 1, min(len(answers), _ROWS)).round().astype(int).tolist()
        texts = ["type", "prompt", "reference", "answer"]
        find = self._tracked.record_of
        table = self._wandb.Table(columns=["record", *texts, *KINDS])
        for answer in (answers[index] for index in chosen):
            record = find(answer["file"], answer["line"]) if find else None
            media = [self._medium(kind, record) for kind in KINDS]
            place = f"{Path(answer['file']).name}:{answer['line']}"
            table.add_data(place, *(answer[name] for name in texts), *media)
        self._run.log({_TABLE: table}, step=step)

    def close(self, *, failed: bool) -> None:
        """Finish the run."""
        self._run.finish(exit_code=int(failed))

    def _medium(self, kind: Kind, record: Record | None) -> Any:
        """The first image or clip of a record, for W&B; None where it has none, or W&B cannot show it."""
        for source in _media_of(kind, record) if record else ():
            try:
                return self._shown(kind, source)
            except Exception as error:  # a table without an image is better than none
                log.warning("W&B cannot show the %s of a held-out record (%s)", kind, error)
        return None

    def _shown(self, kind: Kind, source: MediaSource) -> Any:
        if kind == "image":
            file = file_of(source)
            return self._wandb.Image(file if isinstance(file, str) else Image.open(BytesIO(file)))
        if isinstance(source, str):
            return self._wandb.Audio(source)
        return self._wandb.Audio(load_clip(source), sample_rate=SAMPLE_RATE)

    def _start(self, run: TrackedRun) -> Any:
        folder = run.folder.path
        arguments: dict[str, Any] = {
            "project": run.options.project,
            "tags": run.options.tags,
            "name": run.name,
            "dir": str(folder),
            "id": _run_id(folder / "wandb" / "run_id"),
            "resume": "allow",
            "config": dict(run.config),
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
        if mode == "online":
            try:
                return self._init(mode, arguments)
            except Exception as error:
                self._wandb.teardown()  # else the id counts as in use
                log.warning("W&B could not be reached (%s); it records offline", error)
                mode = "offline"
        _set_aside(folder / "wandb")
        return self._init(mode, arguments)

    def _init(self, mode: str, arguments: dict[str, Any]) -> Any:
        settings = self._wandb.Settings(
            console="off", silent=mode != "online", init_timeout=_PATIENCE_S, finish_timeout=_UPLOAD_S
        )
        return self._wandb.init(mode=mode, settings=settings, **arguments)


def _media_of(kind: Kind, record: Record) -> Iterator[MediaSource]:
    return (part.content for turn in record.turns for part in turn.parts if part.kind == kind)


def _set_aside(folder: Path) -> None:
    """Move what earlier lives recorded offline to where `wandb sync .../offline-run-*` does not find it."""
    for old in sorted(folder.glob("offline-run-*")):
        aside = folder / "replaced"
        aside.mkdir(exist_ok=True)
        old.rename(aside / old.name)


def _run_id(file: Path) -> str:
    """W&B's name for the run in this folder, so that a resumed run is the same run there."""
    held = kept_id(file)
    if held is not None:
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
