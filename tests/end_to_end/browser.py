"""A file in a browser."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import playwright.sync_api as playwright


@contextmanager
def opened(browser: "playwright.Browser", file: Path, width: int = 1100) -> Iterator["playwright.Page"]:
    """The page, opened from its file; it may ask for nothing, and say nothing to the console."""
    asked, errors = [], []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    page.wait_for_load_state("load")
    yield page
    page.close()
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert errors == []
