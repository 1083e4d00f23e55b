"""quarantine.jsonl: the records that could not be used, each with its reason; nothing is lost in silence."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from train.data.record_set import BadNote
from train.errors import TooMuchBadData


class Quarantine:
    """Collects notes, the same on every rank; one rank writes them.

    file: where to write, or None on the ranks that do not.
    """

    def __init__(self, file: Path | None, *, total_records: int, max_fraction: float):
        self.file = file
        self.limit = max_fraction * total_records
        self.total_records = total_records
        self._seen: set[tuple[str, int]] = set()
        if file is not None:
            file.write_text("")

    def add(self, notes: Iterable[BadNote]) -> int:
        """Take in notes (a line noted before counts once); returns how many are new.

        Raises TooMuchBadData once more than the allowed share of all records is bad.
        """
        new = []
        for note in notes:
            if (note.source, note.line) not in self._seen:
                self._seen.add((note.source, note.line))
                new.append(note)
        if new and self.file is not None:
            with self.file.open("a", encoding="utf-8") as out:
                out.writelines(json.dumps(asdict(note), ensure_ascii=False) + "\n" for note in new)
        if len(self._seen) > self.limit:
            last = f"; the last one: {new[-1].reason}" if new else ""
            raise TooMuchBadData(
                f"{len(self._seen)} of {self.total_records} records cannot be used, more than "
                f"data.max_bad_fraction allows; quarantine.jsonl lists them{last}"
            )
        return len(new)
