"""Random access to the raw records of a data file: JSON lines, a JSON list, or parquet.

The format is told by the content unless it is given, never by the file's name. The records stay on the disk, so
memory does not grow with them beyond 24 bytes a record.
"""

import json
import os
import re
import reprlib
import stat
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from train.errors import BadRecord, OmniTuneError

MAX_LINE_BYTES = 64 * 2**20
"""Longest record that is parsed: pictures embedded as base64 fit, a file without line ends does not."""

MAX_LIST_BYTES = 2 * 2**30
"""Largest JSON list: it is read as a whole to find its records. JSON lines have no such limit."""

_BOM = b"\xef\xbb\xbf"
_CHUNK = 2**22
_SPACE = re.compile(r"[ \t\r\n]*")
_IS_INK = ~np.isin(np.arange(256), list(b" \t\r\n"))
"""Which bytes make a line one that is not blank."""


class Source(ABC):
    """The raw records of one file, by index. It can be pickled: files are reopened where they are read."""

    def __init__(self, path: Path):
        self.path = path

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """The record, which is a JSON object; BadRecord where it cannot be read as one."""

    def line(self, index: int) -> int:
        """Where the record stands, from 1: the line in a JSON lines file, else the item or row."""
        return index + 1

    def index_of(self, line: int) -> int | None:
        """The index of the record that stands there, if any."""
        return line - 1 if 1 <= line <= len(self) else None

    def _bad(self, index: int, reason: str) -> BadRecord:
        return BadRecord(f"{self.path}:{self.line(index)}: {reason}")

    def _as_object(self, index: int, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._bad(index, f"a JSON object was expected, found {type(value).__name__}; put one record here")
        return value


class _Json(Source):
    """JSON objects, found by the byte offsets where they begin and end: int64 (n, 2)."""

    def __init__(self, path: Path, spans: np.ndarray):
        super().__init__(path)
        self._spans = spans
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        begin, end = map(int, self._spans[index])
        if end - begin > MAX_LINE_BYTES:
            limit = MAX_LINE_BYTES // 2**20
            raise self._bad(index, f"the record has {end - begin} bytes, more than {limit} MiB; keep media in files")
        try:
            text = self._read(begin, end).decode("utf-8")
            value = _DECODER.decode(text.removeprefix("\ufeff"))  # files that were joined have marks inside
        except OSError as error:
            raise self._bad(index, f"it cannot be read ({error.strerror}); check the disk") from None
        except UnicodeDecodeError as error:
            raise self._bad(index, f"not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
        except (ValueError, RecursionError) as error:
            raise self._bad(index, f"invalid JSON ({error}); correct the record or remove it") from None
        return self._as_object(index, value)

    def _read(self, begin: int, end: int) -> bytes:
        if self._file is None:
            self._file = self.path.open("rb")
        # Forked workers share the file's position, so it is never used.
        return os.pread(self._file.fileno(), end - begin, begin)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}


class JsonLines(_Json):
    """A JSON object a line."""

    def __init__(self, path: Path):
        spans, self._lines = _index_lines(path)
        super().__init__(path, spans)

    def line(self, index: int) -> int:
        return int(self._lines[index])

    def index_of(self, line: int) -> int | None:
        index = int(np.searchsorted(self._lines, line))
        return index if index < len(self) and self._lines[index] == line else None


class JsonList(_Json):
    """One JSON list of objects."""

    def __init__(self, path: Path):
        if (size := path.stat().st_size) > MAX_LIST_BYTES:
            raise OmniTuneError(
                f"{path}: a JSON list of {size} bytes, more than {MAX_LIST_BYTES // 2**30} GiB; "
                "write one record a line, which may be of any size"
            )
        try:
            super().__init__(path, _index_list(path))
        except (ValueError, RecursionError) as error:
            raise OmniTuneError(
                f"{path}: it is not a valid JSON list ({error}); "
                "correct it, or write one record a line, where a bad one costs only itself"
            ) from None


class Parquet(Source):
    """A record a row, memory-mapped through the cache of `datasets`."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            from datasets import Dataset
        except ImportError:
            raise OmniTuneError(
                f"{path}: reading parquet needs the package datasets; run `pip install datasets`"
            ) from None
        try:
            # The arrow format hands media over as they are stored, never decoded.
            self._rows = Dataset.from_parquet(str(path)).with_format("arrow")
        except Exception as error:
            raise OmniTuneError(f"{path}: it cannot be read as parquet ({error}); write it again") from error

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._rows[int(index)].to_pylist()[0]
        except (ValueError, OverflowError) as error:  # text that is no UTF-8, times outside the calendar
            raise self._bad(index, f"the row cannot be read ({error}); correct it or remove it") from None


_FORMATS: dict[str, type[JsonLines | JsonList | Parquet]] = {"jsonl": JsonLines, "json": JsonList, "parquet": Parquet}


def open_source(path: str | Path, format: str = "auto") -> Source:
    """The records of a file; OmniTuneError if it is missing, unreadable or empty.

    format: "jsonl", "json" or "parquet"; "auto" tells it from what the file holds.

    >>> open_source("records.jsonl")[0]  # doctest: +SKIP
    {'conversations': [{'role': 'user', 'content': 'Hello'}, {'role': 'assistant', 'content': 'Hi.'}]}
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise OmniTuneError(f"data file '{path}' is {kind}; name the file that holds the records")
        with path.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        raise OmniTuneError(f"data file '{path}' does not exist; correct its path") from None
    except OSError as error:
        raise OmniTuneError(f"data file '{path}' cannot be opened ({error.strerror}); check its rights") from None
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise OmniTuneError(f"data file '{path}' is in UTF-16; convert it to UTF-8")
    source = (_FORMATS.get(format) or _format_of(head))(path)
    if not len(source):
        raise OmniTuneError(f"data file '{path}' holds no records; remove it from the options or fill it")
    return source


def _format_of(head: bytes) -> type[JsonLines | JsonList | Parquet]:
    if head.startswith(b"PAR1"):
        return Parquet
    return JsonList if head.removeprefix(_BOM).lstrip().startswith(b"[") else JsonLines


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the key {reprlib.repr(max(counts, key=counts.__getitem__))} stands twice in one object")
    return made


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object_of)


def _index_lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Byte spans, int64 (n, 2), and numbers from 1, int64 (n,), of the lines that are not blank."""
    found = [np.empty((0, 3), np.int64)]
    with path.open("rb") as file:
        begin = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(begin)
        offset, number, inked = begin, 1, False
        while chunk := file.read(_CHUNK):
            data = np.frombuffer(chunk, np.uint8)
            ends = np.flatnonzero(data == ord("\n"))
            # One value for each line, the last for what the chunk begins of the next one.
            ink = np.logical_or.reduceat(np.append(_IS_INK[data], False), np.append(0, ends + 1))
            ink[0] |= inked
            kept = np.flatnonzero(ink[:-1])
            begins = np.append(begin, ends + 1 + offset)
            found.append(np.stack([begins[kept], ends[kept] + offset, kept + number], axis=1))
            begin, number, inked = int(begins[-1]), number + len(ends), bool(ink[-1])
            offset += len(chunk)
    if inked:
        found.append(np.array([[begin, offset, number]]))
    table = np.concatenate(found)
    return table[:, :2].copy(), table[:, 2].copy()


def _index_list(path: Path) -> np.ndarray:
    """Byte spans of a list's items, int64 (n, 2); ValueError or RecursionError if it is not a list."""
    # As Latin-1 each byte is a character; those of other alphabets stand only inside strings.
    text = path.read_bytes().removeprefix(_BOM).decode("latin-1")
    shift = path.stat().st_size - len(text)
    decoder = json.JSONDecoder(strict=False, parse_int=float)  # what an item holds is checked when it is read
    spans: list[tuple[int, int]] = []
    at = _after_space(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError(f"it begins with {text[at : at + 1]!r}, not with '['")
    at = _after_space(text, at + 1)
    while text[at : at + 1] != "]" or spans:
        try:
            _, end = decoder.raw_decode(text, at)
        except ValueError as error:
            raise ValueError(f"item {len(spans) + 1}: {error}") from None
        spans.append((at + shift, end + shift))
        at = _after_space(text, end)
        if text[at : at + 1] != ",":
            break
        at = _after_space(text, at + 1)
    if text[at : at + 1] != "]" or _after_space(text, at + 1) < len(text):
        raise ValueError(f"item {len(spans)} is not followed by ',' or by the final ']'")
    return np.array(spans, np.int64).reshape(-1, 2)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found
    return found.end()
