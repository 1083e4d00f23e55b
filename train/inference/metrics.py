"""How well an answer agrees with its reference: the field's metrics, as pure functions of two texts.

Each returns (score, weight). A metric of many records is the sum of scores ÷ the sum of weights, so that ranks add up
both: weight is 1 where records count alike, and the reference's length for error rates, which are those of a corpus.

WER, CER and F1 first make both texts plain: Unicode NFKC, lower case, punctuation deleted, white space collapsed; a
Chinese character or a kana is a word of its own, and spaces beside it do not count.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable

import jiwer

Metric = Callable[[str, str], tuple[float, float]]

ANLS_THRESHOLD = 0.5

_ARTICLES = {"a", "an", "the"}
_UNSPACED = "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"
"""Characters of scripts that put no spaces between words."""

_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number)
    for number, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), 1)
}
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "i'm i've isn't it'd it'll ma'am mightn't might've mustn't must've needn't o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone's something'd something'll that's there'd there're "
    "there's they'd they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll "
    "you're you've"
)
_VQA_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTIONS.split()}


def exact_match(answer: str, reference: str) -> tuple[float, float]:
    """1 where the texts are equal but for white space around them."""
    return float(answer.strip() == reference.strip()), 1.0


def vqa_accuracy(answer: str, reference: str) -> tuple[float, float]:
    """1 where the texts are equal after the VQA evaluation's normalisation: punctuation, case, numbers, articles.

    Source: Antol et al., VQA (2015), with the marks and words of its evaluation code. That gives min(n / 3, 1) for n of
    ten people who answered alike; a record has one reference, so that it is 0 or 1 here.
    """
    return float(_vqa_form(answer) == _vqa_form(reference)), 1.0


def anls(answer: str, reference: str) -> tuple[float, float]:
    """1 - Levenshtein distance ÷ the longer text's characters, case ignored; 0 where half or more would have to change.

    Source: Biten et al., Scene Text Visual Question Answering (2019).
    """
    said, meant = (" ".join(text.lower().split()) for text in (answer, reference))
    distance = _edits(jiwer.process_characters(meant, said)) / max(len(said), len(meant), 1)
    return (1.0 - distance if distance < ANLS_THRESHOLD else 0.0), 1.0


def f1(answer: str, reference: str) -> tuple[float, float]:
    """Harmonic mean of precision and recall over words, as bags, without articles; Chinese by character.

    Source: Rajpurkar et al., SQuAD (2016).
    """
    said, meant = (Counter(word for word in _words(text) if word not in _ARTICLES) for text in (answer, reference))
    if not said or not meant:
        return float(said == meant), 1.0
    return 2 * (said & meant).total() / (said.total() + meant.total()), 1.0


def wer(answer: str, reference: str) -> tuple[float, float]:
    """Word errors (substituted, deleted, inserted), and the reference's words; Chinese by character."""
    said, meant = _words(answer), _words(reference)
    return _edits(jiwer.process_words(" ".join(meant), " ".join(said))), float(len(meant))


def cer(answer: str, reference: str) -> tuple[float, float]:
    """Character errors, and the reference's characters; single spaces between words count."""
    said, meant = (re.sub(f" ?({_UNSPACED}) ?", r"\1", " ".join(_words(text))) for text in (answer, reference))
    return _edits(jiwer.process_characters(meant, said)), float(len(meant))


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "f1": f1,
    "wer": wer,
    "cer": cer,
}


def _edits(alignment: jiwer.WordOutput | jiwer.CharacterOutput) -> float:
    return float(alignment.substitutions + alignment.deletions + alignment.insertions)


def _words(text: str) -> list[str]:
    plain = "".join(
        character
        for character in unicodedata.normalize("NFKC", text).lower()
        if character not in string.punctuation and not unicodedata.category(character).startswith("P")
    )
    return re.sub(_UNSPACED, r" \g<0> ", plain).split()


def _vqa_form(text: str) -> str:
    text = " ".join(text.split())
    has_thousands = re.search(r"\d,\d", text)
    plain = text
    for mark in _VQA_MARKS:
        is_outside_words = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if is_outside_words or has_thousands else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    words = (_VQA_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(_VQA_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
