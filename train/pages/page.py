"""Templates into pages, and pages into files."""

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from train.errors import OmniTuneError


def render(template: Path, **values: Any) -> str:
    """The page of a template, which may extend and import what lies beside it and beside this file."""
    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["figure"] = figure
    return environment.get_template(template.name).render(**values)


def write_page(file: Path, page: str) -> None:
    """Write a page whole or not at all. Raises OmniTuneError where it cannot be written."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        # A file's name may hold bytes that are no text.
        aside.write_text(page, encoding="utf-8", errors="backslashreplace")
        aside.replace(file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OmniTuneError(f"'{file}' cannot be written ({error}); name another file") from None


def figure(value: float | None) -> str:
    """A number as a page shows it: four digits that count, all digits of a large one, "-" for none."""
    if value is None or value != value:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
