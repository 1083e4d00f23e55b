"""From a raw record to a checked `Record`, in whichever of `formats.FORMATS` it was written."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data.formats import FORMATS
from train.data.formats.content import is_text, many, medium_part, quoted, text_parts
from train.data.formats.format import Message, entries
from train.errors import BadRecord
from train.schema import KINDS, Kind, Part, Record, Turn

MAX_TEXT = 2**20
"""Most characters of a conversation: they are tokenized before anything can be said about its length."""

MAX_TYPE = 100
"""Most characters of a record's type."""

_TAG = re.compile(r"<(image|audio)>\n?")


def parse_record(raw: dict[str, Any], *, root: Path, file: str, line: int) -> Record:
    """The checked conversation of a raw record.

    Args:
        raw: the record as `readers.Source` gives it.
        root: the folder that media paths are relative to, and that they may not leave.
        file: the data file, for messages.
        line: its line in that file, from 1.

    Raises:
        BadRecord: with the place and the reason, if the record breaks a rule or a medium is missing.

    >>> raw = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]}
    >>> parse_record(raw, root=Path("."), file="a.jsonl", line=1).turns[1].parts[0].content
    'Hi.'
    """
    try:
        turns = _turns(raw, root)
        _check_turns(turns)
        _check_learned(turns)
        return Record(turns, file, line, _type(raw.get("type")))
    except BadRecord as fault:
        raise BadRecord(f"{file}:{line}: {fault}") from None


def parse_messages(messages: Sequence[Mapping[str, Any]], *, root: Path | None = None) -> Record:
    """The checked conversation that a user wants answered: messages of `{"role", "content"}`.

    Args:
        root: as in `parse_record`; None: the working folder, which media paths may leave.

    Raises:
        BadRecord: with the reason, if a message breaks a rule or a medium is missing.
    """
    turns = _turns({"conversations": [dict(message) for message in messages]}, root)
    _check_turns(turns)
    return Record(turns)


def _type(value: Any) -> str:
    """The record's own word for its kind; what is no text says nothing."""
    if not isinstance(value, str):
        return ""
    if len(value) > MAX_TYPE or not is_text(value):
        raise BadRecord(f"the type {quoted(value)} is no short word; shorten it to {MAX_TYPE} characters")
    return value


def _turns(raw: dict[str, Any], root: Path | None) -> tuple[Turn, ...]:
    entries(raw)  # without turns, no format is asked
    form = next(form for form in FORMATS if form.recognises(raw))
    messages = form.messages(raw, root)
    media = {kind: _top_level_media(raw, kind, root) for kind in KINDS}
    if form.has_tags or any(media.values()):
        _place_media(messages, media)
    return tuple(Turn(message.role, tuple(message.parts), message.weight) for message in messages)


def _top_level_media(raw: dict[str, Any], kind: Kind, root: Path | None) -> list[Part]:
    value = raw.get(kind) if raw.get(kind) is not None else raw.get(f"{kind}s")
    return [medium_part(kind, item, root) for item in many(value)]


def _place_media(messages: list[Message], media: dict[Kind, list[Part]]) -> None:
    """Put the media of a record where the tags of its user turns stand; without tags, first of all."""
    asked = [message for message in messages if message.role in ("user", "observation")]
    texts = [part.content for message in asked for part in message.parts if part.kind == "text"]
    tags = Counter(kind for text in texts for kind in _TAG.findall(str(text)))
    leading = []
    for kind, parts in media.items():
        if parts and not tags[kind]:
            leading += parts
        elif tags[kind] != len(parts):
            raise BadRecord(f"{tags[kind]} <{kind}> tag(s) for {len(parts)} {kind}(s); write one tag for each, or none")
    waiting = {kind: iter(parts) for kind, parts in media.items()}
    for message in asked:
        message.parts[:] = [placed for part in message.parts for placed in _split_tags(part, waiting)]
    if leading:
        if not asked:
            raise BadRecord("there are media but no user turn to put them in; add one")
        asked[0].parts[:0] = leading


def _split_tags(part: Part, waiting: dict[Kind, Any]) -> list[Part]:
    """A text cut at its tags, with the next medium of each tag's kind in its place."""
    if part.kind != "text":
        return [part]
    pieces = _TAG.split(str(part.content))
    texts, kinds = pieces[::2], pieces[1::2]
    parts = text_parts(texts[0])
    for kind, text in zip(kinds, texts[1:], strict=True):
        parts += [next(waiting[kind]), *text_parts(text)]  # type: ignore[index]
    return parts


def _check_turns(turns: tuple[Turn, ...]) -> None:
    """What must hold of every conversation."""
    texts = (len(str(part.content)) for turn in turns for part in turn.parts if part.kind == "text")
    if (characters := sum(texts)) > MAX_TEXT:
        raise BadRecord(f"its texts have {characters} characters, more than the {MAX_TEXT} allowed; split it")
    for number, turn in enumerate(turns, 1):
        if turn.role == "system" and number > 1:
            raise BadRecord(f"turn {number} is a system turn; only the first turn may be one")
        if all(part.kind == "text" and not str(part.content).strip() for part in turn.parts):
            raise BadRecord(f"turn {number} ({turn.role}) is empty; fill it or remove it")
        if turn.role == "assistant" and any(part.kind != "text" for part in turn.parts):
            raise BadRecord(f"turn {number} is the assistant's and holds an image or audio; only text is generated")


def _check_learned(turns: tuple[Turn, ...]) -> None:
    """What must hold of a conversation that is learned from."""
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRecord("there is no assistant turn, so nothing is learned; add one")
    if not any(turn.role == "assistant" and turn.weight for turn in turns):
        raise BadRecord("every assistant turn has weight 0, so nothing is learned; remove the record")
