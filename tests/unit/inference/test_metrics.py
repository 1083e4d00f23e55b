"""The metrics of answers, on cases worked out by hand."""

import jiwer
import pytest

from train.config import METRICS as NAMES
from train.inference.metrics import METRICS, Metric, anls, cer, exact_match, f1, vqa_accuracy, wer


def test_options_know_every_metric() -> None:
    assert list(METRICS) == list(NAMES)


@pytest.mark.parametrize(
    ("answer", "reference", "score"), [(" red\n", "red", 1), ("Red", "red", 0), ("", "red", 0), ("", "", 1)]
)
def test_exact_match(answer: str, reference: str, score: float) -> None:
    assert exact_match(answer, reference) == (score, 1)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("The Dog.", "dog", 1),
        ("two", "2", 1),
        ("none", "0", 1),
        ("dont know", "don't know", 1),
        ("1,000", "1000", 1),
        ("1.5", "15", 0),
        ("t-shirt", "t shirt", 1),
        ("yes, sir", "yes sir", 1),
        ("well", "we'll", 0),
        ("cat", "dog", 0),
    ],
)
def test_vqa_accuracy(answer: str, reference: str, score: float) -> None:
    assert vqa_accuracy(answer, reference) == (score, 1)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("Invoice  7", "invoice 7", 1),
        ("kitten", "kittens", 6 / 7),
        ("abcd", "abxd", 0.75),
        ("abxy", "abcd", 0),
        ("", "", 1),
        ("", "abc", 0),
        ("北京大学", "北京大雪", 0.75),
    ],
)
def test_anls(answer: str, reference: str, score: float) -> None:
    assert anls(answer, reference) == (pytest.approx(score), 1)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("a red kettle", "The red, small kettle!", 2 * 2 / (2 + 3)),
        ("red red", "red", 2 * 1 / (2 + 1)),
        ("红色水壶", "红色的水壶。", 2 * 4 / (4 + 5)),
        ("the", "", 1),
        ("", "red", 0),
    ],
)
def test_f1(answer: str, reference: str, score: float) -> None:
    assert f1(answer, reference) == (pytest.approx(score), 1)


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "edits", "length"),
    [
        (wer, "Hello, world", "hello world", 0, 2),
        (wer, "hello brave new world", "hello old world", 2, 3),
        (wer, "", "hello world", 2, 2),
        (wer, "hello", "", 1, 0),
        (wer, "今天 天气好", "今天天气真好!", 1, 6),
        (wer, "打开WiFi", "打开 wifi", 0, 3),
        (wer, "１２ 点", "12点", 0, 2),
        (cer, "helo world", "Hello world.", 1, 11),
        (cer, "helloworld", "hello world", 1, 11),
        (cer, "今天 天气好", "今天天气真好!", 1, 6),
        (cer, "", "abc", 3, 3),
        (cer, "ab", "", 2, 0),
    ],
)
def test_error_rates(metric: Metric, answer: str, reference: str, edits: float, length: float) -> None:
    """Words, or characters: how many to change, and how many there are."""
    assert metric(answer, reference) == (edits, length)


def test_error_rates_are_jiwers_of_the_whole_corpus() -> None:
    """Records of unequal length, whose mean rate would be another figure."""
    references = ["turn on the light", "stop", "play some quiet music please"]
    answers = ["turn the lights on", "stop it", "play some music please"]
    for metric, theirs in ((wer, jiwer.wer), (cer, jiwer.cer)):
        pairs = [metric(answer, reference) for answer, reference in zip(answers, references, strict=True)]
        edits, length = (sum(values) for values in zip(*pairs, strict=True))
        assert edits / length == pytest.approx(theirs(references, answers))
        assert edits / length != pytest.approx(sum(score / weight for score, weight in pairs) / len(pairs))
