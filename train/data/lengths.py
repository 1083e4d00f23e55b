"""Lengths of records, measured once: a cache by the content of the record file and all that lengths depend on."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

_CHUNK = 2**22


class LengthCache:
    """A folder of measured lengths, one .npz for each (record file, media root, settings).

    settings: all else that a length depends on, as JSON values.
    """

    def __init__(self, folder: Path, settings: Any):
        self.folder, self.settings = folder, settings

    def load(self, path: str, root: str) -> tuple[np.ndarray, list[str]] | None:
        """Lengths int32 (records, 3) and types of a record file, if it was measured before."""
        try:
            with np.load(self._file(path, root), allow_pickle=False) as held:
                names = held["type_names"].tolist()
                return held["lengths"], [names[code] for code in held["type_codes"]]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):  # none, or damaged
            return None

    def save(self, path: str, root: str, lengths: np.ndarray, types: list[str]) -> None:
        """Keep what was measured; written aside first, since several runs may share the folder."""
        file = self._file(path, root)
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f"{file.stem}.{os.getpid()}.partial.npz")
        codes = {name: code for code, name in enumerate(dict.fromkeys(types))}
        np.savez_compressed(
            aside,
            lengths=lengths,
            type_names=np.array(list(codes), dtype=np.str_),
            type_codes=np.fromiter((codes[name] for name in types), np.int32, len(types)),
        )
        aside.replace(file)

    def _file(self, path: str, root: str) -> Path:
        about = json.dumps([os.path.realpath(root), self.settings], sort_keys=True)
        return self.folder / f"{digest([Path(path)], about)}.npz"


def digest(files: Iterable[Path], more: str = "") -> str:
    """A short hash of the files' contents and of a text."""
    state = hashlib.blake2b(more.encode(), digest_size=16)
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                state.update(chunk)
    return state.hexdigest()
