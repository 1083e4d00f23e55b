"""Lengths of records, measured once: a cache by the contents of the record file, all that lengths depend on, and the
sizes and times of the media."""

import hashlib
import json
import os
import socket
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from train.data.media import stamp
from train.schema import KINDS, Lengths, Record, file_of

PART = 4096
"""Records of a part: about a second's work, after which it is kept."""

_FORM = 2
"""Of what is written; a file of another form is not found."""

_CHUNK = 2**22

Stamps = list[tuple[str, int, int]]
"""Of the media files that a record names: path, bytes, time of the last change in ns."""


@dataclass
class Part:
    """What was measured of consecutive records of a file.

    lengths: int32 (n, 1 + kinds), rows of `Lengths`; 0 tokens: not usable.
    types: of each record.
    stamps: of each record, as its media were when it was measured.
    """

    lengths: np.ndarray
    types: list[str]
    stamps: list[Stamps]

    @classmethod
    def unknown(cls, count: int) -> "Part":
        """So many records of which nothing is known yet."""
        return cls(np.zeros((count, 1 + len(KINDS)), np.int32), [""] * count, [[] for _ in range(count)])

    def todo(self) -> list[int]:
        """The records to measure: those not usable so far, and those whose media have changed since."""
        tokens = self.lengths[:, 0].tolist()
        return [row for row, stamps in enumerate(self.stamps) if not tokens[row] or not all(map(holds, stamps))]

    def set(self, row: int, lengths: Lengths, kind: str, stamps: Stamps) -> None:
        """Take in what a record measures."""
        self.lengths[row] = lengths.row()
        self.types[row], self.stamps[row] = kind, stamps

    def forget(self, row: int) -> None:
        """Note that a record cannot be used."""
        self.lengths[row] = 0
        self.types[row], self.stamps[row] = "", []


def stamps_of(record: Record) -> Stamps:
    """The media files of a record as they are now; an OSError if one is gone."""
    paths = [file_of(part.content) for turn in record.turns for part in turn.parts if part.kind != "text"]
    return [(path, *stamp(path)) for path in paths if isinstance(path, str)]


def holds(stamped: tuple[str, int, int]) -> bool:
    """Whether a medium is as it was."""
    try:
        return stamp(stamped[0]) == stamped[1:]
    except OSError:
        return False


class LengthCache:
    """A folder of measured lengths.

    settings: all that a length depends on beside the record file and its media, as JSON values.
    """

    def __init__(self, folder: Path, settings: Any):
        self.folder, self.settings = folder, settings

    def of(self, path: str, root: str) -> "SourceCache":
        """What is kept of a record file whose media lie under `root`."""
        about = json.dumps([_FORM, PART, os.path.realpath(root), self.settings], sort_keys=True)
        return SourceCache(self.folder / digest([Path(path)], about))


@dataclass(frozen=True)
class SourceCache:
    """The measured parts of one record file: an .npz each in a folder."""

    folder: Path

    def load(self, number: int) -> Part | None:
        """A part by its number, if it was measured before."""
        try:
            with np.load(self.folder / f"{number}.npz", allow_pickle=False) as held:
                names = held["type_names"].tolist()
                types = [names[code] for code in held["type_codes"]]
                paths = held["paths"].tobytes().decode("utf-8", "surrogateescape").split("\0")
                stamps = list(zip(paths, *held["stamps"].T.tolist(), strict=False))
                ends = held["counts"].cumsum().tolist()
                begins = [0, *ends[:-1]]
                return Part(held["lengths"], types, [stamps[a:b] for a, b in zip(begins, ends, strict=True)])
        except (OSError, ValueError, IndexError, KeyError, EOFError, BadZipFile, zlib.error):  # none, or damaged
            return None

    def save(self, number: int, part: Part) -> None:
        """Keep a part; written aside first, since several runs may share the folder. OSError where that fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f"{number}.{socket.gethostname()}.{os.getpid()}.partial.npz"
        codes = {name: code for code, name in enumerate(dict.fromkeys(part.types))}
        stamps = [stamp for of_record in part.stamps for stamp in of_record]
        paths = "\0".join(path for path, _, _ in stamps).encode("utf-8", "surrogateescape")
        np.savez_compressed(
            aside,
            lengths=part.lengths,
            type_names=np.array(list(codes), dtype=np.str_),
            type_codes=np.fromiter((codes[name] for name in part.types), np.int32, len(part.types)),
            paths=np.frombuffer(paths, np.uint8),
            stamps=np.array([stamp[1:] for stamp in stamps], np.int64).reshape(-1, 2),
            counts=np.fromiter(map(len, part.stamps), np.int32, len(part.stamps)),
        )
        aside.replace(self.folder / f"{number}.npz")


def digest(files: Iterable[Path], more: str = "") -> str:
    """A short hash of the files' contents and of a text."""
    state = hashlib.blake2b(more.encode(), digest_size=16)
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                state.update(chunk)
    return state.hexdigest()
