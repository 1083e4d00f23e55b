"""Random access to the raw records of a data file: JSON lines, a JSON list, or parquet.

The format is told by the content unless it is given, never by the file's name. The records stay on the disk, so
memory does not grow with them beyond 24 bytes a record.
"""

import json
import os
import reprlib
import stat
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from train.errors import BadRecord, OmniTuneError

MAX_LINE_BYTES = 64 * 2**20
"""Longest record that is parsed: images embedded as base64 fit, a file without line ends does not."""

MAX_VALUES = 2**21
"""Most values in a record, about: as objects of Python they take thirty times the memory of their text."""

_BOM = b"\xef\xbb\xbf"
_CHUNK = 2**22
_IS_INK = ~np.isin(np.arange(256), list(b" \t\r\n"))
"""Which bytes make a line one that is not blank."""
_IS_MARK = np.isin(np.arange(256), list(b'"[]{},'))
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1


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
            data = self._read(begin, end)
            if len(data) > MAX_VALUES and sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
                raise self._bad(index, f"the record has over {MAX_VALUES} values; keep media in files")
            text = data.decode("utf-8")
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
        try:
            super().__init__(path, _index_list(path))
        except ValueError as error:
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
    lines, _ = _pieces(path, lambda chunk: np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")))
    return lines[:, :2].copy(), lines[:, 2].copy()


def _index_list(path: Path) -> np.ndarray:
    """Byte spans of a list's items, int64 (n, 2); ValueError if brackets and commas do not make a list of them."""
    cuts = _ListCuts()
    pieces, count = _pieces(path, cuts)
    items, numbers = pieces[:, :2].copy(), pieces[:, 2] - 1  # the first piece stands before the list, the last behind
    if cuts.first != "[" or 0 in numbers:
        with path.open("rb") as file:
            first = file.read(_CHUNK).removeprefix(_BOM).lstrip()[:1].decode("latin-1")
        raise ValueError(f"it begins with {first!r}, not with '['")
    if cuts.ends != 1 or count - 1 in numbers:
        raise ValueError(f"item {cuts.items} is not followed by ',' or by the final ']'")
    if len(items) < cuts.items and cuts.items > 1:
        missing = np.setdiff1d(np.arange(1, cuts.items + 1), numbers)[0]
        raise ValueError(f"item {missing}: nothing stands there")
    return items


def _pieces(path: Path, cuts_of: Callable[[bytes], np.ndarray]) -> tuple[np.ndarray, int]:
    """What stands between cuts: begin, end and number from 1 of each piece that is not blank, int64 (n, 3), and how
    many there are, blank ones among them.

    cuts_of: the indices of the separators in the chunk that comes next.
    """
    found = [np.empty((0, 3), np.int64)]
    with path.open("rb") as file:
        begin = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(begin)
        offset, number, inked = begin, 1, False
        while chunk := file.read(_CHUNK):
            ends = cuts_of(chunk)
            # One value for each piece, the last for what the chunk begins of the next one.
            is_ink = np.append(_IS_INK[np.frombuffer(chunk, np.uint8)], False)
            is_ink[ends] = False
            ink = np.logical_or.reduceat(is_ink, np.append(0, ends + 1))
            ink[0] |= inked
            kept = np.flatnonzero(ink[:-1])
            begins = np.append(begin, ends + 1 + offset)
            found.append(np.stack([begins[kept], ends[kept] + offset, kept + number], axis=1))
            begin, number, inked = int(begins[-1]), number + len(ends), bool(ink[-1])
            offset += len(chunk)
    if inked:
        found.append(np.array([[begin, offset, number]]))
    return np.concatenate(found), number


class _ListCuts:
    """Finds a list's opening bracket, the commas between its items, and its closing bracket, chunk by chunk.

    Nothing is parsed, so that an item costs no memory, and a broken one only itself.
    """

    def __init__(self) -> None:
        self.first, self.items, self.ends = "", 0, 0
        """The first bracket, the items up to the first end, and how often the outermost bracket is closed."""
        self._depth, self._in_string, self._is_escaped = 0, False, False

    def __call__(self, chunk: bytes) -> np.ndarray:
        if self._is_escaped:
            chunk = b" " + chunk[1:]
        plain = chunk.replace(rb"\\", b"  ").replace(rb"\"", b"  ")
        self._is_escaped = plain.endswith(b"\\")
        data = np.frombuffer(plain, np.uint8)
        at = np.flatnonzero(_IS_MARK[data])
        is_quote = data[at] == ord('"')
        in_string = (np.cumsum(is_quote) + self._in_string) % 2 == 1
        self._in_string = bool(in_string[-1]) if len(at) else self._in_string
        at = at[~in_string & ~is_quote]
        steps = _STEP[data[at]]
        depths = np.cumsum(steps, dtype=np.int64) + self._depth
        self._depth = int(depths[-1]) if len(at) else self._depth
        is_end = (depths == 0) & (steps < 0)
        is_cut = ((depths == 1) & (steps >= 0)) | is_end
        at, is_end = at[is_cut], is_end[is_cut]
        if len(at):
            self.first = self.first or chr(data[at[0]])
        if not self.ends:
            before_end = np.cumsum(is_end) == 0
            self.items += int(before_end.sum())
        self.ends += int(is_end.sum())
        return at
