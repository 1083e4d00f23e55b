"""quarantine.jsonl: the records that could not be used, each with its reason; nothing is lost in silence."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.data.record_set import BadNote
from train.errors import TooMuchBadData

_FEW = 10
"""Bad records that a small set may have."""


class Quarantine:
    """Collects notes, the same on every rank; one rank writes them.

    file: where to write, or None on the ranks that do not. What it held before is dropped: `restore` brings back
    what belongs to a checkpoint, and what was found after it is found again.
    total_records, max_fraction: more bad records than this share of all end the run; of a few records up to 10, but no
    more than half, may be bad, unless the share is 0.
    held_out: number of held-out records among them, and held_out_files: where they stand; for the message.
    """

    def __init__(
        self,
        file: Path | None,
        *,
        total_records: int,
        max_fraction: float,
        held_out: int = 0,
        held_out_files: Collection[str] = (),
    ):
        self.file = file
        few = min(_FEW, total_records // 2) if max_fraction else 0
        self.limit = max(max_fraction * total_records, few)
        self.total_records, self.held_out = total_records, held_out
        self.held_out_files = frozenset(held_out_files)
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
                f"{self.summary()}, more than data.max_bad_fraction allows; {self._where()} lists them{last}"
            )
        return len(new)

    def _where(self) -> str:
        return f"'{self.file}'" if self.file else "quarantine.jsonl"

    def summary(self) -> str:
        """How many records cannot be used, and how many of them are held out."""
        bad = len(self._notes)
        said = f"{bad} of {self.total_records} records cannot be used"
        if not self.held_out:
            return said
        held_out = sum(note.source in self.held_out_files for note in self._notes.values())
        training = self.total_records - self.held_out
        return f"{said} ({bad - held_out} of the {training} to train on, {held_out} of the {self.held_out} held out)"

    def _write(self, notes: Iterable[BadNote], mode: str) -> None:
        if self.file is None:
            return
        # A file's name may hold bytes that are no text; escaped, the line is still JSON.
        with self.file.open(mode, encoding="utf-8", errors="backslashreplace") as out:
            out.writelines(json.dumps(asdict(note), ensure_ascii=False) + "\n" for note in notes)
