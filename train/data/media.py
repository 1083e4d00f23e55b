"""Opening media: regular files and encoded bytes of a bounded size, and nothing that could wait or never end."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from io import BytesIO, FileIO
from typing import Any, BinaryIO, TypeVar, cast

from train.errors import BadRecord
from train.schema import Kind, MediaFile

R = TypeVar("R")

MAX_BYTES: dict[Kind, int] = {"image": 2**28, "audio": 2**30}
"""Largest file that is opened: an uncompressed image of 67 megapixels fits, and half an hour of studio sound."""

_HEADER_READS = 20_000
_HEADER_BYTES = 2**24
"""How often a header is read or searched, and how far: colour profiles and embedded previews fit, a chain of a million
chunks does not."""

_REMEMBERED = 256
"""Files whose headers are remembered: those of a record, and of the few before it."""


@contextmanager
def reading(kind: Kind, source: MediaFile, advice: str, buffering: int = -1) -> Iterator[Any]:
    """The open file; whatever goes wrong inside becomes a BadRecord that names it.

    advice: what to do about a file that its decoder cannot read.
    buffering: as in `open`; 0 for a decoder that reads a file by its descriptor.
    """
    try:
        with _opened(source, MAX_BYTES[kind], buffering) as file:
            yield file
    except BadRecord as fault:
        raise BadRecord(f"{medium_name(kind, source)}: {fault}") from None
    except Exception as error:  # decoders fail in many ways on broken files
        raise BadRecord(f"{medium_name(kind, source)} cannot be read ({error}); {advice}") from None


def stamp(path: str) -> tuple[int, int]:
    """Bytes of a file, and the time of its last change in ns: what tells that it is as it was."""
    status = os.stat(path)  # noqa: PTH116 (pathlib is slow)
    return status.st_size, status.st_mtime_ns


def remembered(read: Callable[[MediaFile], R]) -> Callable[[MediaFile], R]:
    """The function with what it found in the last files remembered, as long as they do not change."""

    @lru_cache(_REMEMBERED)
    def found(path: str, _: tuple[int, int]) -> R:
        return read(path)

    @wraps(read)
    def look_up(source: MediaFile) -> R:
        try:
            stamped = stamp(source) if isinstance(source, str) else None
        except (OSError, ValueError):  # `read` says what is wrong with it
            stamped = None
        return read(source) if stamped is None else found(cast(str, source), stamped)

    return look_up


def medium_name(kind: Kind, source: MediaFile) -> str:
    """What a message calls a medium."""
    return f"{kind} {source!r}" if isinstance(source, str) else f"embedded {kind}"


def head_of(file: BinaryIO, size: int = 12) -> bytes:
    """The first bytes of a file, which stays at its beginning."""
    file.seek(0)
    head = file.read(size)
    file.seek(0)
    return head


@contextmanager
def header_of(file: BinaryIO) -> Iterator["HeaderReads"]:
    """The file for reading its header alone; BadRecord if the header goes on for too long.

    Some decoders take quadratic time over a header, or search a whole file for one.
    """
    header = HeaderReads(file)
    try:
        yield header
    finally:
        if header.is_over:
            raise BadRecord("its header does not end; save it again without metadata") from None


class HeaderReads:
    """A file that ends where no header goes that far. It raises nothing: decoders in C could not pass that on."""

    def __init__(self, file: BinaryIO):
        self._file, self._reads, self._bytes = file, 0, 0

    @property
    def is_over(self) -> bool:
        """Whether more was asked for than a header may hold."""
        return self._reads > _HEADER_READS or self._bytes > _HEADER_BYTES

    def read(self, size: int = -1) -> bytes:
        self._reads += 1
        data = b"" if self.is_over else self._file.read(min(size, _HEADER_BYTES + 1))
        if size >= 0:  # who takes the whole file at once does so only once
            self._bytes += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._reads += 1
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):  # a damaged header leads before the beginning
            return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        self._reads += 1
        count = 0 if self.is_over else cast(FileIO, self._file).readinto(buffer)
        self._bytes += count
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _opened(source: MediaFile, most: int, buffering: int) -> BinaryIO:
    if isinstance(source, bytes):
        _check_size(len(source), most)
        return BytesIO(source)
    # Without O_NONBLOCK a pipe would keep us waiting for its writer.
    descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadRecord("it is not a regular file; give the path of the encoded medium")
        _check_size(status.st_size, most)
    except BadRecord:
        os.close(descriptor)
        raise
    return cast(BinaryIO, os.fdopen(descriptor, "rb", buffering))


def _check_size(size: int, most: int) -> None:
    if not size:
        raise BadRecord("it is empty; replace it")
    if size > most:
        raise BadRecord(f"it has {size} bytes, more than the {most} allowed; make it smaller")
