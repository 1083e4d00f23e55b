"""Answers judged one by one."""

from dataclasses import replace

import pytest

from train.data.record_set import BadNote
from train.inference.predictions import Prediction
from train.report.answers import badness, confusions, judge, reasons

METRICS = ["exact_match", "wer/speech"]


def prediction(line: int, reference: str, answer: str, kind: str = "") -> Prediction:
    return Prediction("held.jsonl", line, kind, f"user: {line}?", reference, answer)


@pytest.mark.parametrize(
    ("kind", "answer", "expected"),
    [
        ("", "one two", 0.0),
        ("", "one", 1.0),
        ("speech", "one", (1 + 1 / 2) / 2),
        ("speech", "a b c d e", (1 + 5 / 2) / 2),
    ],
)
def test_how_bad_an_answer_is(kind: str, answer: str, expected: float) -> None:
    assert badness(prediction(1, "one two", answer, kind), METRICS) == pytest.approx(expected)


def test_what_got_worse_comes_first_then_the_worst_then_what_changed() -> None:
    before = [prediction(n, "a", said) for n, said in enumerate("abbab", 1)]
    now = [replace(one, answer=said) for one, said in zip(before, "aabba", strict=True)]
    now.append(prediction(6, "a b", "c d", "speech"))
    answers = judge(now, before, METRICS)
    assert [answer.of.line for answer in answers] == [4, 3, 6, 2, 5, 1]
    assert [answer.is_worse for answer in answers] == [True, False, False, False, False, False]
    assert [answer.is_changed for answer in answers] == [True, False, False, True, True, False]
    assert answers[0].before == "a"
    assert answers[2].before is None


def test_a_confusion_table_counts_answers_by_reference() -> None:
    said = [("red", "red"), ("red", "blue"), ("blue", "blue"), ("blue", "Blue?"), ("blue", "blue")]
    answers = judge([prediction(n, *pair) for n, pair in enumerate(said)], [], METRICS)
    [table] = confusions(answers)
    assert table.references == ["blue", "red"]
    assert table.answers == ["blue", "red", ""]
    assert table.counts == {("red", "red"): 1, ("red", "blue"): 1, ("blue", "blue"): 2, ("blue", ""): 1}


def test_many_different_references_make_no_table() -> None:
    assert confusions(judge([prediction(n, str(n), "") for n in range(9)], [], METRICS)) == []


def test_reasons_are_grouped_without_names_and_numbers() -> None:
    notes = [
        BadNote("a.jsonl", 3, "a.jsonl:3: image 'x.png' not found"),
        BadNote("a.jsonl", 5, "a.jsonl:5: the texts have 900 characters"),
        BadNote("b.jsonl", 9, "b.jsonl:9: image 'y.png' not found"),
    ]
    assert reasons(notes) == [
        ("image 'x.png' not found", 2, ["a.jsonl:3", "b.jsonl:9"]),
        ("the texts have 900 characters", 1, ["a.jsonl:5"]),
    ]
