"""The lines of a certificate, as a table and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Line:
    """A promise, and what was found of it.

    figure: how far two things differ that should be equal; None where there is none.
    tolerance: what rounding may make of it; None where the figure alone does not decide.
    passed: None where the line was skipped. why: what was compared, or why not, or what is wrong.
    """

    name: str
    figure: float | None
    tolerance: float | None
    passed: bool | None
    why: str


def compared(name: str, figure: float, tolerance: float, why: str) -> Line:
    """A line that passes up to its tolerance, and never with what is no number."""
    return Line(name, figure, tolerance, figure <= tolerance, why)


def skipped(name: str, why: str) -> Line:
    """A line that nothing is said about."""
    return Line(name, None, None, None, why)


def failed(name: str, why: str) -> Line:
    """A line whose comparison could not be made."""
    return Line(name, None, None, False, why)


def table(lines: Sequence[Line]) -> str:
    """The lines as an aligned table."""
    words = {True: "passed", False: "FAILED", None: "skipped"}
    rows = [("", "figure", "tolerance", "", "")]
    rows += [(line.name, _number(line.figure), _number(line.tolerance), words[line.passed], line.why) for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{name:{widths[0]}}  {figure:>{widths[1]}}  {tolerance:>{widths[2]}}  {word:{widths[3]}}  {why}".rstrip()
        for name, figure, tolerance, word, why in rows
    )


def write(file: Path, lines: Sequence[Line], about: dict[str, Any]) -> None:
    """Write the lines, and what they are about, as JSON; a figure that is no number as null."""
    values = [asdict(line) | {"figure": _finite(line.figure)} for line in lines]
    aside = file.with_name(f".{file.name}")
    aside.write_text(json.dumps({"lines": values, **about}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(file)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None
