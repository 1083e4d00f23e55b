"""What the turns of all record formats hold: texts and media, checked."""

import binascii
import os
import re
import reprlib
import stat
from base64 import b64decode
from functools import lru_cache
from pathlib import Path
from typing import Any

from train.errors import BadRecord
from train.schema import KINDS, Kind, Part, Span, file_of

MAX_PARTS = 4096
"""Most turns of a conversation, and most texts, images and recordings in them."""

MAX_SECOND = 1e7
"""Last second that a span may name."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_QUOTE = reprlib.Repr()
_QUOTE.maxstring = 300
_QUOTE.maxlevel = 2
quoted = _QUOTE.repr
"""A value as a message shows it: short, whatever the record holds."""


def parts_of(content: Any, root: Path | None) -> list[Part]:
    """The parts of a turn's content: a text, a mapping of text and media, or a list of typed items.

    root: the folder that media paths are relative to, and may not leave; None = the working folder, which they may.
    """
    if content is None:
        return []
    if isinstance(content, str):
        return text_parts(content)
    if isinstance(content, list):
        return [part for item in many(content) for part in _item(item, root)]
    if not isinstance(content, dict):
        raise BadRecord(f"the content of a turn is {type(content).__name__}; write a text, an object or a list")
    if unknown := [name for name in content if name not in ("text", *KINDS) and content[name] is not None]:
        raise BadRecord(f"the content of a turn has the unknown key {quoted(unknown[0])}; use text, image or audio")
    media = [medium_part(kind, value, root) for kind in KINDS for value in many(content.get(kind))]
    return media + text_parts(content.get("text"))


def _item(item: Any, root: Path | None) -> list[Part]:
    """One element of a content list of the OpenAI format."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text":
        return text_parts(item.get("text"))
    if kind in KINDS:
        found = [item[key] for key in (kind, "path", "url") if item.get(key) is not None]
        return [_with_span(medium_part(kind, found[0] if found else None, root), item)]
    if kind in ("image_url", "audio_url"):
        value = item.get(kind)
        held = value if isinstance(value, dict) else {"url": value}
        return [_with_span(medium_part(kind.removesuffix("_url"), held.get("url"), root), held)]
    if kind == "input_audio":
        value = item.get("input_audio")
        data = value.get("data") if isinstance(value, dict) else None
        if isinstance(data, str) and not data.startswith("data:"):
            return [Part("audio", _decode_base64("audio", data))]
        return [medium_part("audio", data, root)]
    raise BadRecord(
        f"a content item has the type {quoted(kind)}; use text, image_url, audio_url, input_audio, image or audio"
    )


def many(value: Any) -> list[Any]:
    """A value that may be none, one or a list of them, as a list."""
    if value is None:
        return []
    if not isinstance(value, list):
        return [value]
    if len(value) > MAX_PARTS:
        raise BadRecord(f"a list has {len(value)} items, more than the {MAX_PARTS} allowed; split the record")
    return value


def text_parts(value: Any) -> list[Part]:
    """A text as a part; nothing where it is empty."""
    if value is None or value == "":
        return []
    if not isinstance(value, str):
        raise BadRecord(f"a text is {type(value).__name__}; write it as a string")
    if not is_text(value):
        raise BadRecord("a text holds half of a surrogate pair, which is no character; remove it")
    return [Part("text", value)]


def medium_part(kind: Kind, value: Any, root: Path | None) -> Part:
    """An image or recording: its bytes, or the real path of a regular file under `root`; of a recording, a span."""
    if isinstance(value, dict):
        file = value.get("path") if value.get("bytes") is None else value["bytes"]
        return _with_span(medium_part(kind, file, root), value)
    if isinstance(value, bytes) and value:
        return Part(kind, value)
    if not isinstance(value, str) or not value:
        raise BadRecord(f"{kind} {quoted(value)} is neither a path nor encoded bytes; give one of them")
    if value.startswith("data:"):
        head, _, data = value.partition(",")
        if not head.endswith(";base64"):
            raise BadRecord(f"{kind} {quoted(head)} is a data URL without base64; encode it so, or give a path")
        return Part(kind, _decode_base64(kind, data))
    if _URL.match(value):
        raise BadRecord(f"{kind} {quoted(value)} is a URL, and nothing is fetched; save it under root")
    return Part(kind, _contained_file(kind, value, root))


def _with_span(part: Part, stated: dict[str, Any]) -> Part:
    """The recording, or the span of it that `start_s` and `end_s` name."""
    given = {name: stated[name] for name in ("start_s", "end_s") if stated.get(name) is not None}
    if not given:
        return part
    if part.kind != "audio" or isinstance(part.content, Span):
        raise BadRecord(f"{part.kind} with {' and '.join(given)}; a span is one recording's, and stated once")
    for name, second in given.items():
        if not isinstance(second, int | float) or isinstance(second, bool) or not 0 <= second < MAX_SECOND:
            raise BadRecord(f"audio with {name} {quoted(second)}; write seconds, from 0 to {MAX_SECOND:g}")
    start, end = float(given.get("start_s", 0.0)), given.get("end_s")
    if end is not None and end <= start:
        raise BadRecord(f"audio with end_s {end:g} and start_s {start:g}; end_s is the later one")
    return Part("audio", Span(file_of(part.content), start, None if end is None else float(end)))


def _decode_base64(kind: Kind, data: str) -> bytes:
    try:
        decoded = b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord(f"embedded {kind} is not valid base64 ({error}); encode it again") from None
    if not decoded:
        raise BadRecord(f"embedded {kind} is empty; encode it again")
    return decoded


_real_folder = lru_cache(maxsize=4096)(os.path.realpath)


def _contained_file(kind: Kind, path: str, root: Path | None) -> str:
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
            raise BadRecord(f"{kind} {quoted(path)} not found; fix the path") from None
        where = "" if os.path.isabs(path) else f" under {root}/"  # noqa: PTH117
        raise BadRecord(f"{kind} {quoted(path)} not found{where}; fix the path or set root") from None
    except (OSError, ValueError) as error:
        raise BadRecord(f"{kind} {quoted(path)} cannot be looked up ({_reason(error)}); fix the path") from None
    if status is None:
        raise BadRecord(f"{kind} {quoted(path)} lies outside {root}/, where media may not be; move it or set root")
    if not stat.S_ISREG(status.st_mode):
        raise BadRecord(f"{kind} {quoted(path)} is not a regular file; give the path of the encoded {kind}")
    return real


def _reason(error: OSError | ValueError) -> str:
    """Why, without the path once more."""
    return error.strerror or "" if isinstance(error, OSError) else str(error)


def _is_under(real: str, real_root: str) -> bool:
    return real.startswith(real_root.rstrip(os.sep) + os.sep)


def is_text(value: str) -> bool:
    """Whether a string has characters alone, and no half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
