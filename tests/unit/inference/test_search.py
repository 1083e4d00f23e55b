"""The search over a folder of texts, and the loop of call, observation and cited answer."""

from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.runs import ROOT
from tests.unit.data.builders import make_tokenizer
from train.data.functions import WEB_SEARCH, Call, Found, system_text
from train.errors import OmniTuneError
from train.families.megrez_instruct.processor import MegrezTextProcessor
from train.families.minicpm.processor import MiniCPMProcessor
from train.inference.chat import Chat
from train.inference.search import MAX_CALLS, RESULTS, LocalSearch, Searched
from train.modules.chatting import ChatMixin

NOW = datetime(2026, 11, 20, 12)
QUESTION = [{"role": "user", "content": "Where does tea grow?"}]
TEA = Found("Tea", "Tea grows on hills.")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "deep").mkdir()
    (folder / "tea.txt").write_text("Tea\nTea grows on hills.\n\nIt is drunk hot.\n", encoding="utf-8")
    (folder / "deep/coffee.md").write_text("# Coffee\n\nCoffee grows in Ethiopia.\n", encoding="utf-8")
    (folder / "茶.txt").write_text("中国茶\n茶馆在北京很多。\n", encoding="utf-8")
    (folder / "title.txt").write_text("Only a title\n", encoding="utf-8")
    (folder / "photo.jpg").write_bytes(b"tea")
    return folder


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("tea hills", [TEA, Found("Tea", "It is drunk hot.")]),
        ("ETHIOPIA?", [Found("Coffee", "Coffee grows in Ethiopia.")]),
        ("北京", [Found("中国茶", "茶馆在北京很多。")]),
        ("only", [Found("Only a title", "Only a title")]),
        ('tea" AND (', [TEA, Found("Tea", "It is drunk hot.")]),
        ("zebra", []),
        ("*", []),
    ],
)
def test_passages_are_found_by_their_words(texts: Path, query: str, found: list[Found]) -> None:
    assert sorted(LocalSearch(texts)(query), key=str) == sorted(found, key=str)
    assert LocalSearch(texts)("tea hills")[0] == TEA


def test_the_best_come_first_and_not_too_many() -> None:
    results = LocalSearch(ROOT / "data/websearch/texts")("Corvin museum year")
    assert results[0].title == "Corvin museum"
    assert len(results) == RESULTS


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OmniTuneError, match="holds no texts to search; name a folder"):
        LocalSearch(tmp_path)


class Scripted(ChatMixin):
    """Says what it is told to, and keeps what it was asked."""

    device = "cpu"
    config = SimpleNamespace(max_position_embeddings=4096)

    def __init__(self, *turns: str, processor: Any = None):
        self.processor = processor or MegrezTextProcessor(make_tokenizer())
        self.turns = list(turns)
        self.prompts: list[str] = []

    def generate(self, batch, **options):
        assert options == {"max_new_tokens": 7, "do_sample": False}
        self.prompts.append(self.processor.tokenizer.decode(batch.input_ids))
        return [torch.tensor(self.processor.tokenizer(self.turns.pop(0))["input_ids"])]


def search(texts: Path, model: Scripted) -> list[Searched | str]:
    return list(Chat(model, frozenset()).answer_by_search(QUESTION, LocalSearch(texts), max_new_tokens=7))


def test_the_model_searches_reads_and_answers(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.inference.chat.datetime", SimpleNamespace(now=lambda: NOW))
    call = Call("web_search", {"query": "tea hills"}).text
    model = Scripted(call, "On hills [citation:1].")
    assert search(texts, model) == [Searched("tea hills", LocalSearch(texts)("tea hills")), "On hills [citation:1]."]
    asked = f"<|role_start|>system<|role_end|>{system_text([WEB_SEARCH], NOW)}<|turn_end|>"
    asked += "<|role_start|>user<|role_end|>Where does tea grow?<|turn_end|><|role_start|>assistant<|role_end|>"
    assert model.prompts[0] == asked
    assert model.prompts[1].startswith(
        f"{asked}{call}<|turn_end|><|role_start|>observation<|role_end|>[1] Tea\nTea grows"
    )


def test_a_plain_answer_needs_no_search(texts: Path) -> None:
    assert search(texts, Scripted("Hello.")) == ["Hello."]


def test_an_unknown_function_finds_nothing(texts: Path) -> None:
    model = Scripted(Call("calculator", {"query": "tea"}).text, "I do not know.")
    assert search(texts, model) == [Searched("tea", []), "I do not know."]
    assert "Nothing was found." in model.prompts[1]


def test_searches_end(texts: Path) -> None:
    call = Call("web_search", {"query": "tea"}).text
    said = search(texts, Scripted(*[call] * (MAX_CALLS + 1)))
    assert [type(step) for step in said] == [Searched] * MAX_CALLS + [str]


def test_a_family_without_functions_is_refused(texts: Path) -> None:
    processor = MiniCPMProcessor.from_pretrained(ROOT / "data/tiny_minicpm")
    with pytest.raises(OmniTuneError, match="knows no function calls"):
        search(texts, Scripted(processor=processor))
