"""Folders of runs, written by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from train.commands.options import compose_options


def write_run(
    folder: Path,
    lines: Sequence[dict[str, Any]],
    predictions: dict[int, Sequence[tuple[str, str]]] | None = None,
    words: Sequence[str] = (),
    **environment: Any,
) -> Path:
    """A run's folder.

    lines: of metrics.jsonl. predictions: by step, the (reference, answer) of each record of held.jsonl.
    words: options beside the defaults.
    """
    folder.mkdir(parents=True)
    _, resolved = compose_options(list(words))
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved))
    (folder / "environment.json").write_text(json.dumps({"working_folder": str(folder), **environment}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "predictions").mkdir()
    for step, answers in (predictions or {}).items():
        rows = [
            {"file": "held.jsonl", "line": number, "type": "a", "prompt": f"user: {number}?", "reference": meant}
            | {"answer": said}
            for number, (meant, said) in enumerate(answers, 1)
        ]
        (folder / "predictions" / f"step-{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def step(number: int, loss: float | None, **values: float) -> dict[str, Any]:
    """A step's line of metrics.jsonl."""
    return {"step": number, "loss": loss, **values}


def evaluation(number: int, loss: float, **values: float) -> dict[str, Any]:
    """An evaluation's line."""
    return {"step": number, "eval/loss": loss, **{f"eval/{name}": value for name, value in values.items()}}
