"""What a record format is: where a raw record has its turns, and how they are told apart."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from train.data.formats.content import MAX_PARTS, many, parts_of, quoted
from train.errors import BadRecord
from train.schema import Part

WEIGHTS = (1e-6, 1e3)
"""Smallest and largest weight of a turn that is learned."""

ROLES = ("system", "user", "assistant", "observation")


class Message(NamedTuple):
    """A turn whose text may still hold tags."""

    role: str
    parts: list[Part]
    weight: float


class RecordFormat(ABC):
    """A way of writing a conversation as JSON; its instances are listed in `formats.FORMATS`."""

    role_key: ClassVar[str] = "role"
    content_key: ClassVar[str] = "content"
    roles: ClassVar[Mapping[str, str]] = {role: role for role in ROLES}
    """Our role for each of the format's own."""
    has_tags: ClassVar[bool] = False
    """Whether texts mark the places of media by `<image>` and `<audio>`."""

    @abstractmethod
    def recognises(self, raw: Mapping[str, Any]) -> bool:
        """Whether a record is written so."""

    def messages(self, raw: Mapping[str, Any], root: Path | None) -> list[Message]:
        """The turns of a record; BadRecord where one breaks a rule. root: see `content.parts_of`."""
        found = []
        count = 0
        for number, entry in enumerate(many(entries(raw)), 1):
            if not isinstance(entry, dict):
                raise BadRecord(f"turn {number} is {type(entry).__name__}; write it as an object")
            name = entry.get(self.role_key)
            if not isinstance(name, str) or name not in self.roles:
                known = ", ".join(self.roles)
                raise BadRecord(f"turn {number} has the unknown role {quoted(name)}; use one of {known}")
            parts = parts_of(entry.get(self.content_key), root)
            found.append(Message(self.roles[name], parts, _weight(entry.get("weight"), number)))
            count += len(parts)
            if count > MAX_PARTS:
                raise BadRecord(f"up to turn {number} there are {count} parts, more than {MAX_PARTS}; split the record")
        return found


def entries(raw: Mapping[str, Any]) -> list[Any]:
    """The turns of a record as they are written; BadRecord where there are none."""
    found = raw["messages"] if raw.get("conversations") is None and "messages" in raw else raw.get("conversations")
    if not isinstance(found, list) or not found:
        raise BadRecord("no turns found; give a list of them under 'conversations' or 'messages'")
    return found


def _weight(value: Any, number: int) -> float:
    if value is None:
        return 1.0
    smallest, largest = WEIGHTS
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (value == 0 or smallest <= value <= largest):
        raise BadRecord(
            f"turn {number} has the weight {quoted(value)}; use 0 or a number from {smallest:g} to {largest:g}"
        )
    return float(value)
