"""quarantine.jsonl: the records that could not be used, each with its reason; nothing is lost in silence."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.data.record_set import BadNote
from train.errors import TooMuchBadData


class Quarantine:
    """Collects notes, the same on every rank; one rank writes them.

    file: where to write, or None on the ranks that do not. What it held before is dropped: `restore` brings back
    what belongs to a checkpoint, and what was found after it is found again.
    """

    def __init__(self, file: Path | None, *, total_records: int, max_fraction: float):
        self.file = file
        self.limit = max_fraction * total_records
        self.total_records = total_records
        self._notes: dict[tuple[str, int], BadNote] = {}
        self._write(self.notes, "w")

    @property
    def notes(self) -> list[BadNote]:
        """All notes, in the order of the file: what `RecordSet.leave_out` takes after `restore`."""
        return list(self._notes.values())

    def state(self) -> list[dict[str, Any]]:
        """The notes as JSON values, for a checkpoint."""
        return [asdict(note) for note in self.notes]

    def restore(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Go back to a checkpoint's notes; those that this start added stay behind them. The file is rewritten."""
        added = self._notes
        self._notes = {}
        for note in [*(BadNote(**values) for values in state), *added.values()]:
            self._notes.setdefault((note.source, note.line), note)
        self._write(self.notes, "w")

    def add(self, notes: Iterable[BadNote]) -> int:
        """Take in notes (a line noted before counts once); returns how many are new.

        Raises TooMuchBadData once more than the allowed share of all records is bad.
        """
        new = []
        for note in notes:
            if (note.source, note.line) not in self._notes:
                self._notes[note.source, note.line] = note
                new.append(note)
        self._write(new, "a")
        if len(self._notes) > self.limit:
            last = f"; the last one: {new[-1].reason}" if new else ""
            raise TooMuchBadData(
                f"{len(self._notes)} of {self.total_records} records cannot be used, more than "
                f"data.max_bad_fraction allows; quarantine.jsonl lists them{last}"
            )
        return len(new)

    def _write(self, notes: Iterable[BadNote], mode: str) -> None:
        if self.file is None:
            return
        # A file's name may hold bytes that are no text; escaped, the line is still JSON.
        with self.file.open(mode, encoding="utf-8", errors="backslashreplace") as out:
            out.writelines(json.dumps(asdict(note), ensure_ascii=False) + "\n" for note in notes)
