"""The answers of an evaluation beside their references: the files of predictions/."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Prediction:
    """An answer beside its reference: a line of predictions/."""

    file: str
    line: int
    type: str
    prompt: str
    """The turns before the answer, a line each, with <image> and <audio> where media stand."""
    reference: str
    answer: str


def write_predictions(file: Path, predictions: Iterable[Prediction]) -> None:
    """Write them as JSON lines, into a folder that is made where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # A file's name may hold bytes that are no text; escaped, the line is still JSON.
    with file.open("w", encoding="utf-8", errors="backslashreplace") as out:
        out.writelines(json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in predictions)
