"""The answers of an evaluation, judged one by one: how bad each is, and whether it was so before."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from train.config import METRICS as MORE_IS_BETTER
from train.data.record_set import BadNote
from train.inference.metrics import METRICS
from train.inference.predictions import Prediction

_FEW = 25
"""Most different references of a type for which a confusion table is shown."""

Key = tuple[str, int, str, str]
"""What makes a held-out record the same in two evaluations: file, line, prompt and reference."""


@dataclass(frozen=True)
class Answer:
    """An answer beside its reference, and the answer of an evaluation before."""

    of: Prediction
    badness: float
    """0 where every metric finds nothing wrong; the mean of 1 - score, or of errors ÷ the reference's length"""
    before: str | None = None
    badness_before: float | None = None

    @property
    def is_right(self) -> bool:
        """Whether no metric finds anything wrong."""
        return self.badness == 0

    @property
    def is_changed(self) -> bool:
        """Whether the answer was another before."""
        return self.before is not None and self.before != self.of.answer

    @property
    def is_worse(self) -> bool:
        """Whether the answer was better before."""
        return self.badness_before is not None and self.badness > self.badness_before


@dataclass(frozen=True)
class Confusion:
    """How often each reference of a type was answered by what."""

    type: str
    references: list[str]
    answers: list[str]
    """the references, and what else was answered together, as ""."""
    counts: dict[tuple[str, str], int]
    """by (reference, answer)"""


def key_of(prediction: Prediction) -> Key:
    """The same for the same held-out record in another evaluation of the run."""
    return prediction.file, prediction.line, prediction.prompt, prediction.reference


def scores(prediction: Prediction, metrics: Sequence[str]) -> dict[str, tuple[float, float]]:
    """(score, weight) by each metric that is for records of its type.

    metrics: as in the option `eval.metrics`: `exact_match`, or `wer/speech` for one type alone.
    """
    found = {}
    for entry in metrics:
        name, _, kind = entry.partition("/")
        if name in METRICS and (not kind or kind == prediction.type):
            found[name] = METRICS[name](prediction.answer, prediction.reference)
    return found


def badness(prediction: Prediction, metrics: Sequence[str]) -> float:
    """How bad an answer is, from 0 on: see `Answer.badness`."""
    found = scores(prediction, metrics) or scores(prediction, ["exact_match"])
    parts = [
        max(1 - score, 0.0) if MORE_IS_BETTER[name] else score / max(weight, 1.0)
        for name, (score, weight) in found.items()
    ]
    return sum(parts) / len(parts)


def judge(now: Iterable[Prediction], before: Iterable[Prediction], metrics: Sequence[str]) -> list[Answer]:
    """The answers, those that got worse first, then the worst, then those that changed."""
    earlier = {key_of(prediction): prediction for prediction in before}
    answers = []
    for prediction in now:
        last = earlier.get(key_of(prediction))
        answers.append(
            Answer(
                prediction,
                badness(prediction, metrics),
                last.answer if last else None,
                badness(last, metrics) if last else None,
            )
        )
    return sorted(answers, key=lambda answer: (not answer.is_worse, -answer.badness, not answer.is_changed))


def confusions(answers: Iterable[Answer]) -> list[Confusion]:
    """A table for each type of records that has few different references, most of them of several records."""
    by_type: dict[str, list[Prediction]] = {}
    for answer in answers:
        by_type.setdefault(answer.of.type, []).append(answer.of)
    made = []
    for kind, predictions in sorted(by_type.items()):
        references = sorted({prediction.reference for prediction in predictions})
        if not 2 <= len(references) <= min(_FEW, len(predictions) / 2):
            continue
        known = set(references)
        counts = Counter((one.reference, one.answer if one.answer in known else "") for one in predictions)
        others = [""] if any(answer == "" for _, answer in counts) else []
        made.append(Confusion(kind, references, [*references, *others], dict(counts)))
    return made


def reasons(notes: Iterable[BadNote]) -> list[tuple[str, int, list[str]]]:
    """(an example, how many, where the first stand) of each reason for quarantine, the most frequent first."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for note in notes:
        place = f"{note.source}:{note.line}"
        said = note.reason.removeprefix(f"{place}: ")
        kind = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "…", said)
        groups.setdefault(kind, []).append((said, place))
    rows = [(found[0][0], len(found), [place for _, place in found]) for found in groups.values()]
    return sorted(rows, key=lambda row: -row[1])
