"""Random access to the raw records of a data file: JSON lines, a JSON list, or parquet.

The format is told by the content unless it is given, never by the file's name. JSON lines and parquet stay on
the disk, so memory does not grow with them beyond 24 bytes a line; a JSON list is held as it was parsed.
"""

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from train.errors import BadRecord, OmniTuneError

MAX_LINE_BYTES = 64 * 2**20
"""Longest line that is parsed: pictures embedded as base64 fit, a file without line ends does not."""

_BOM = b"\xef\xbb\xbf"
_CHUNK = 2**22
_SHORT = 32
"""Bytes within which a line may turn out to be blank; no record is as short."""


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

    def _bad(self, index: int, reason: str) -> BadRecord:
        return BadRecord(f"{self.path}:{self.line(index)}: {reason}")

    def _as_object(self, index: int, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._bad(index, f"a JSON object was expected, found {type(value).__name__}; put one record here")
        return value


class JsonLines(Source):
    """A JSON object a line, found by byte offsets."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._spans, self._lines = _index_lines(path)
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        begin, end = map(int, self._spans[index])
        if end - begin > MAX_LINE_BYTES:
            limit = MAX_LINE_BYTES // 2**20
            raise self._bad(index, f"the line has {end - begin} bytes, more than {limit} MiB; keep media in files")
        try:
            value = _parse_json(self._read(begin, end))
        except UnicodeDecodeError as error:
            raise self._bad(index, f"not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
        except (ValueError, RecursionError) as error:
            raise self._bad(index, f"invalid JSON ({error}); correct the line or remove it") from None
        return self._as_object(index, value)

    def line(self, index: int) -> int:
        return int(self._lines[index])

    def _read(self, begin: int, end: int) -> bytes:
        if self._file is None:
            self._file = self.path.open("rb")
        # Forked workers share the file's position, so it is never used.
        return os.pread(self._file.fileno(), end - begin, begin)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}


class JsonList(Source):
    """One JSON list of objects."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            self._records = _parse_json(path.read_bytes().removeprefix(_BOM))
            if not isinstance(self._records, list):
                raise ValueError(f"it holds one {type(self._records).__name__}")
        except (ValueError, RecursionError) as error:
            raise OmniTuneError(
                f"{path}: it is not a valid JSON list ({error}); "
                "correct it, or write one record a line, where a bad one costs only itself"
            ) from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._as_object(index, self._records[index])


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
        return self._rows[int(index)].to_pylist()[0]


_FORMATS: dict[str, type[JsonLines | JsonList | Parquet]] = {"jsonl": JsonLines, "json": JsonList, "parquet": Parquet}


def open_source(path: str | Path, format: str = "auto") -> Source:
    """The records of a file; OmniTuneError if it is missing, unreadable or empty.

    format: "jsonl", "json" or "parquet"; "auto" tells it from what the file holds.

    >>> open_source("records.jsonl")[0]  # doctest: +SKIP
    {'conversations': [{'role': 'user', 'content': 'Hello'}, {'role': 'assistant', 'content': 'Hi.'}]}
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        raise OmniTuneError(f"data file '{path}' does not exist; correct its path") from None
    except IsADirectoryError:
        raise OmniTuneError(f"data file '{path}' is a folder; name the file in it that holds the records") from None
    except OSError as error:
        raise OmniTuneError(f"data file '{path}' cannot be opened ({error.strerror}); check its rights") from None
    source = (_FORMATS.get(format) or _format_of(head))(path)
    if not len(source):
        raise OmniTuneError(f"data file '{path}' holds no records; remove it from the options or fill it")
    return source


def _format_of(head: bytes) -> type[JsonLines | JsonList | Parquet]:
    if head.startswith(b"PAR1"):
        return Parquet
    return JsonList if head.removeprefix(_BOM).lstrip().startswith(b"[") else JsonLines


def _parse_json(text: bytes) -> Any:
    return json.loads(text.decode("utf-8"), parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _index_lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Byte spans, int64 (n, 2), and numbers from 1, int64 (n,), of the lines that are not blank."""
    line_ends = []
    size = 0
    with path.open("rb") as file:
        bom = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(0)
        while chunk := file.read(_CHUNK):
            line_ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
        ends = np.concatenate([*line_ends, [size]]).astype(np.int64)
        begins = np.concatenate([[bom], ends[:-1] + 1]).astype(np.int64)
        kept = np.ones(len(ends), bool)
        for row in np.flatnonzero(ends - begins < _SHORT):
            file.seek(begins[row])
            text = file.read(ends[row] - begins[row])
            kept[row] = bool(text) and not text.isspace()
    return np.stack([begins, ends], axis=1)[kept], np.flatnonzero(kept) + 1
