"""Answers from a folder of texts: the model calls the search, reads what is found, and answers with citations."""

import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from train.data.functions import WEB_SEARCH, Call, Found, observation_text, read_call, system_text
from train.errors import OmniTuneError

Message = Mapping[str, Any]

RESULTS = 3
"""Passages that a search gives at most."""

MAX_CALLS = 3
"""Searches for one question; after them the model's turn is taken as its answer."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
"""Words, and each character of Chinese and Japanese, which have no spaces between words."""


class LocalSearch:
    """The passages of a folder's .txt and .md files, ranked by SQLite's full-text search (BM25).

    A file's first line is its title; blank lines part its passages.
    """

    def __init__(self, folder: Path):
        """Read the folder, those below it too; OmniTuneError if there are no texts."""
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".txt", ".md"))
        found = [passage for file in files for passage in _passages(file)]
        if not found:
            raise OmniTuneError(f"'{folder}' holds no texts to search; name a folder with .txt or .md files")
        self._index = sqlite3.connect(":memory:", check_same_thread=False)
        self._index.execute("CREATE VIRTUAL TABLE passages USING fts5(words, title UNINDEXED, text UNINDEXED)")
        rows = [(" ".join(_words(f"{passage.title} {passage.text}")), passage.title, passage.text) for passage in found]
        self._index.executemany("INSERT INTO passages VALUES (?, ?, ?)", rows)

    def __call__(self, query: str) -> list[Found]:
        """The passages that share words with the query, the best first."""
        wanted = " OR ".join(f'"{word}"' for word in _words(query))
        if not wanted:
            return []
        order = "SELECT title, text FROM passages WHERE passages MATCH ? ORDER BY rank LIMIT ?"
        return [Found(title, text) for title, text in self._index.execute(order, (wanted, RESULTS))]


@dataclass(frozen=True)
class Searched:
    """A search that the model asked for, and what it found."""

    query: str
    results: list[Found]


def answer(
    next_turn: Callable[[list[Message]], str], messages: Sequence[Message], search: LocalSearch, *, now: datetime
) -> Iterator[Searched | str]:
    """The model's searches as they are made, and at last its answer.

    next_turn: what the model says to a conversation, the special tokens of a call spelled out.
    messages: the conversation up to a question. Where it has no system turn, one that offers the search is put first.
    now: the time that the model is told.
    """
    talk = list(messages)
    if not talk or talk[0]["role"] != "system":
        talk.insert(0, {"role": "system", "content": system_text([WEB_SEARCH], now)})
    said = next_turn(talk)
    for _ in range(MAX_CALLS):
        if (call := read_call(said)) is None:
            break
        searched = _search(call, search)
        yield searched
        observation = {"role": "observation", "content": observation_text(searched.results)}
        talk += [{"role": "assistant", "content": said}, observation]
        said = next_turn(talk)
    yield said.strip()


def _search(call: Call, search: LocalSearch) -> Searched:
    query = call.arguments.get("query")
    if call.name != WEB_SEARCH["name"] or not isinstance(query, str):
        return Searched(str(query), [])
    return Searched(query, search(query))


def _passages(file: Path) -> Iterator[Found]:
    title, _, text = file.read_text(encoding="utf-8", errors="replace").strip().partition("\n")
    title = title.lstrip("#").strip()
    for passage in re.split(r"\n\s*\n", text) if text.strip() else [title]:
        if passage.strip():
            yield Found(title, passage.strip())


def _words(text: str) -> list[str]:
    return _WORD.findall(text)
