"""From a raw record to a checked `Record`, in whichever of three formats it was written.

- Megrez: `conversations` of `{"role", "content": {"text", "image", "audio"} or str}`;
- ALLaVA/LLaVA: `image`, `audio`, and `conversations` of `{"from", "value"}` with `<image>`, `<audio>` tags;
- OpenAI: `messages` of `{"role", "content": str or [{"type": "text" | "image_url" | ...}]}`.
"""

import binascii
import os
import re
import reprlib
import stat
from base64 import b64decode
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from train.data.media import MEDIA, MediumKind
from train.errors import BadRecord
from train.schema import Part, Record, Turn

MAX_TEXT = 2**20
"""Most characters of a conversation: they are tokenized before anything can be said about its length."""

MAX_PARTS = 4096
"""Most turns of a conversation, and most texts, pictures and recordings in them."""

WEIGHTS = (1e-6, 1e3)
"""Smallest and largest weight of a turn that is learned."""

MAX_TYPE = 100
"""Most characters of a record's type."""

ROLES = ("system", "user", "assistant", "observation")

_ROLES = {role: role for role in ROLES}
_SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system", "observation": "observation"}
_TAG = re.compile(r"<(image|audio)>\n?")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_QUOTE = reprlib.Repr()
_QUOTE.maxstring = 300
_QUOTE.maxlevel = 2
_quoted = _QUOTE.repr
"""A value as a message shows it: short, whatever the record holds."""


class _Message(NamedTuple):
    """A turn whose text may still hold tags."""

    role: str
    parts: list[Part]
    weight: float


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
    if len(value) > MAX_TYPE or not _is_text(value):
        raise BadRecord(f"the type {_quoted(value)} is no short word; shorten it to {MAX_TYPE} characters")
    return value


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _turns(raw: dict[str, Any], root: Path | None) -> tuple[Turn, ...]:
    messages, tagged = _messages(raw, root)
    media = {kind: _top_level_media(raw, kind, root) for kind in MEDIA}
    if tagged or any(media.values()):
        _place_media(messages, media)
    return tuple(Turn(message.role, tuple(message.parts), message.weight) for message in messages)


def _messages(raw: dict[str, Any], root: Path | None) -> tuple[list[_Message], bool]:
    """The turns of a record, and whether its texts mark media by tags (the LLaVA format)."""
    entries = raw["messages"] if raw.get("conversations") is None and "messages" in raw else raw.get("conversations")
    if not isinstance(entries, list) or not entries:
        raise BadRecord("no turns found; give a list of them under 'conversations' or 'messages'")
    tagged = False
    messages = []
    count = 0
    for number, entry in enumerate(_many(entries), 1):
        if not isinstance(entry, dict):
            raise BadRecord(f"turn {number} is {type(entry).__name__}; write it as an object")
        if entry.get("from") is not None:
            tagged = True
            name, roles, content = entry["from"], _SPEAKERS, entry.get("value")
        else:
            name, roles, content = entry.get("role"), _ROLES, entry.get("content")
        if not isinstance(name, str) or name not in roles:
            raise BadRecord(f"turn {number} has the unknown role {_quoted(name)}; use one of {', '.join(roles)}")
        messages.append(_Message(roles[name], _parts(content, root), _weight(entry.get("weight"), number)))
        count += len(messages[-1].parts)
        if count > MAX_PARTS:
            raise BadRecord(f"up to turn {number} there are {count} parts, more than {MAX_PARTS}; split the record")
    return messages, tagged


def _weight(value: Any, number: int) -> float:
    if value is None:
        return 1.0
    smallest, largest = WEIGHTS
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (value == 0 or smallest <= value <= largest):
        raise BadRecord(
            f"turn {number} has the weight {_quoted(value)}; use 0 or a number from {smallest:g} to {largest:g}"
        )
    return float(value)


def _parts(content: Any, root: Path | None) -> list[Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return _text(content)
    if isinstance(content, list):
        return [part for item in _many(content) for part in _item(item, root)]
    if not isinstance(content, dict):
        raise BadRecord(f"the content of a turn is {type(content).__name__}; write a text, an object or a list")
    if unknown := [name for name in content if name not in ("text", *MEDIA) and content[name] is not None]:
        raise BadRecord(f"the content of a turn has the unknown key {_quoted(unknown[0])}; use text, image or audio")
    media = [_medium(kind, value, root) for kind in MEDIA for value in _many(content.get(kind))]
    return media + _text(content.get("text"))


def _item(item: Any, root: Path | None) -> list[Part]:
    """One element of a content list of the OpenAI format."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text":
        return _text(item.get("text"))
    if kind in MEDIA:
        found = [item[key] for key in (kind, "path", "url") if item.get(key) is not None]
        return [_medium(kind, found[0] if found else None, root)]
    if kind in ("image_url", "audio_url"):
        value = item.get(kind)
        return [_medium(kind.removesuffix("_url"), value.get("url") if isinstance(value, dict) else value, root)]
    if kind == "input_audio":
        value = item.get("input_audio")
        data = value.get("data") if isinstance(value, dict) else None
        if isinstance(data, str) and not data.startswith("data:"):
            return [Part("audio", _decode_base64("audio", data))]
        return [_medium("audio", data, root)]
    raise BadRecord(
        f"a content item has the type {_quoted(kind)}; use text, image_url, audio_url, input_audio, image or audio"
    )


def _many(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        return [value]
    if len(value) > MAX_PARTS:
        raise BadRecord(f"a list has {len(value)} items, more than the {MAX_PARTS} allowed; split the record")
    return value


def _text(value: Any) -> list[Part]:
    if value is None or value == "":
        return []
    if not isinstance(value, str):
        raise BadRecord(f"a text is {type(value).__name__}; write it as a string")
    if not _is_text(value):
        raise BadRecord("a text holds half of a surrogate pair, which is no character; remove it")
    return [Part("text", value)]


def _medium(kind: MediumKind, value: Any, root: Path | None) -> Part:
    """A picture or recording: its bytes, or the real path of a regular file under `root`."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes) and value:
        return Part(kind, value)
    if not isinstance(value, str) or not value:
        raise BadRecord(f"{kind} {_quoted(value)} is neither a path nor encoded bytes; give one of them")
    if value.startswith("data:"):
        head, _, data = value.partition(",")
        if not head.endswith(";base64"):
            raise BadRecord(f"{kind} {_quoted(head)} is a data URL without base64; encode it so, or give a path")
        return Part(kind, _decode_base64(kind, data))
    if _URL.match(value):
        raise BadRecord(f"{kind} {_quoted(value)} is a URL, and nothing is fetched; save it under root")
    return Part(kind, _contained_file(kind, value, root))


def _decode_base64(kind: MediumKind, data: str) -> bytes:
    try:
        decoded = b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord(f"embedded {kind} is not valid base64 ({error}); encode it again") from None
    if not decoded:
        raise BadRecord(f"embedded {kind} is empty; encode it again")
    return decoded


_real_folder = lru_cache(maxsize=4096)(os.path.realpath)


def _contained_file(kind: MediumKind, path: str, root: Path | None) -> str:
    """The path itself, links resolved, of a regular file that lies under `root`."""
    real_root = str(_real_folder(root)) if root else os.sep
    folder, name = os.path.split(os.path.join(root or Path.cwd(), path))  # noqa: PTH118 (pathlib is slow)
    try:
        real = f"{_real_folder(folder)}{os.sep}{name}"
        status = os.lstat(real) if _is_under(real, real_root) else None
        if status and not stat.S_ISREG(status.st_mode):
            real = os.path.realpath(real)
            status = os.stat(real) if _is_under(real, real_root) else None  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        if root is None:
            raise BadRecord(f"{kind} {_quoted(path)} not found; fix the path") from None
        where = "" if os.path.isabs(path) else f" under {root}/"  # noqa: PTH117
        raise BadRecord(f"{kind} {_quoted(path)} not found{where}; fix the path or set root") from None
    except (OSError, ValueError) as error:
        raise BadRecord(f"{kind} {_quoted(path)} cannot be looked up ({_reason(error)}); fix the path") from None
    if status is None:
        raise BadRecord(f"{kind} {_quoted(path)} lies outside {root}/, where media may not be; move it or set root")
    if not stat.S_ISREG(status.st_mode):
        raise BadRecord(f"{kind} {_quoted(path)} is not a regular file; give the path of the encoded {kind}")
    return real


def _reason(error: OSError | ValueError) -> str:
    """Why, without the path once more."""
    return error.strerror or "" if isinstance(error, OSError) else str(error)


def _is_under(real: str, real_root: str) -> bool:
    return real.startswith(real_root.rstrip(os.sep) + os.sep)


def _top_level_media(raw: dict[str, Any], kind: MediumKind, root: Path | None) -> list[Part]:
    value = raw.get(kind) if raw.get(kind) is not None else raw.get(f"{kind}s")
    return [_medium(kind, item, root) for item in _many(value)]


def _place_media(messages: list[_Message], media: dict[MediumKind, list[Part]]) -> None:
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


def _split_tags(part: Part, waiting: dict[MediumKind, Any]) -> list[Part]:
    """A text cut at its tags, with the next medium of each tag's kind in its place."""
    if part.kind != "text":
        return [part]
    pieces = _TAG.split(str(part.content))
    texts, kinds = pieces[::2], pieces[1::2]
    parts = _text(texts[0])
    for kind, text in zip(kinds, texts[1:], strict=True):
        parts += [next(waiting[kind]), *_text(text)]  # type: ignore[index]
    return parts


def _check_turns(turns: tuple[Turn, ...]) -> None:
    """What must hold of every conversation."""
    texts = (len(part.content) for turn in turns for part in turn.parts if part.kind == "text")
    if (characters := sum(texts)) > MAX_TEXT:
        raise BadRecord(f"its texts have {characters} characters, more than the {MAX_TEXT} allowed; split it")
    for number, turn in enumerate(turns, 1):
        if turn.role == "system" and number > 1:
            raise BadRecord(f"turn {number} is a system turn; only the first turn may be one")
        if all(part.kind == "text" and not str(part.content).strip() for part in turn.parts):
            raise BadRecord(f"turn {number} ({turn.role}) is empty; fill it or remove it")
        if turn.role == "assistant" and any(part.kind != "text" for part in turn.parts):
            raise BadRecord(f"turn {number} is the assistant's and holds a picture or audio; only text is generated")


def _check_learned(turns: tuple[Turn, ...]) -> None:
    """What must hold of a conversation that is learned from."""
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRecord("there is no assistant turn, so nothing is learned; add one")
    if not any(turn.role == "assistant" and turn.weight for turn in turns):
        raise BadRecord("every assistant turn has weight 0, so nothing is learned; remove the record")
