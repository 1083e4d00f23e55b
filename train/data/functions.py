"""Functions that a conversation may call, in Megrez's form: how they are offered, called, and answered.

    system       ... You have access to the following functions. Use them if required -
                 [{"name": "web_search", ...}]
    user         When did the tower of Arlo open?
    assistant    <|function_start|>{"name": "web_search", "arguments": {"query": "Arlo tower"}}<|function_end|>
    observation  [1] The tower of Arlo ...
    assistant    It opened in 1890 [citation:1].

Records hold these texts as they are; without functions in its system turn a conversation is plain chat.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

CALL_ENDS = ("<|function_start|>", "<|function_end|>")

INTRODUCTION = "你是Megrez-3B-Instruct, 将针对用户的问题给出详细的、积极的回答."

WEB_SEARCH: dict[str, Any] = {
    "name": "web_search",
    "description": "Search the web",
    "parameters": {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "Words to search for"}},
        "required": ["query"],
    },
}
"""The function that the sample offers, and `omnitune chat --search` answers."""

_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class Call:
    """A function that the model wants called."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The assistant's turn that makes the call."""
        call = json.dumps({"name": self.name, "arguments": self.arguments}, ensure_ascii=False)
        return f"{CALL_ENDS[0]}{call}{CALL_ENDS[1]}"


@dataclass(frozen=True)
class Found:
    """A result of a search."""

    title: str
    text: str


def system_text(functions: Sequence[Mapping[str, Any]], now: datetime) -> str:
    """The system turn that offers functions, each with name, description and parameters (JSON Schema)."""
    lines = [
        INTRODUCTION,
        f"The current time is {now:%Y-%m-%d %H:%M:%S}, {_WEEKDAYS[now.weekday()]}.",
        "You have access to the following functions. Use them if required -",
        json.dumps(list(functions), indent=4, ensure_ascii=False),
    ]
    return "\n".join(lines)


def read_call(text: str) -> Call | None:
    """The first call in an assistant's turn; None if there is none, or it is not well formed.

    >>> read_call('<|function_start|>{"name": "web_search", "arguments": {"query": "tea"}}<|function_end|>')
    Call(name='web_search', arguments={'query': 'tea'})
    """
    _, opening, rest = text.partition(CALL_ENDS[0])
    inside, closing, _ = rest.partition(CALL_ENDS[1])
    if not (opening and closing):
        return None
    try:
        call = json.loads(inside)
        name, arguments = call["name"], call["arguments"]
    except (ValueError, TypeError, KeyError):
        return None
    return Call(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def observation_text(results: Sequence[Found]) -> str:
    """What a search found, numbered from 1 as `[citation:1]` cites it."""
    if not results:
        return "Nothing was found."
    return "\n\n".join(f"[{number}] {found.title}\n{found.text}" for number, found in enumerate(results, 1))
