"""What several files share: launch.sh's environment, a browser, and tables at the end of the tests' output."""

import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_TABLES = pytest.StashKey[dict[str, list[str]]]()


@pytest.fixture(scope="session")
def tables(pytestconfig: pytest.Config) -> dict[str, list[str]]:
    """Lines by title, shown when all tests have run."""
    return _tables(pytestconfig)


def _tables(config: pytest.Config) -> dict[str, list[str]]:
    return config.stash.setdefault(_TABLES, defaultdict(list))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist hands its tables to the one that started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tables"] = dict(_tables(session.config))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the tables of a process of pytest-xdist."""
    for title, lines in getattr(node, "workeroutput", {}).get("tables", {}).items():
        _tables(node.config)[title] += lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the tables."""
    for title, lines in _tables(config).items():
        terminalreporter.section(title)
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture(scope="session")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This interpreter as launch.sh's environment, under a stamp that tells it to install nothing.

    Links to the environment's folders would do too, but DeepSpeed compiles its operators anew for each path.
    """
    folder = tmp_path_factory.mktemp("venv")
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / ".installed").touch()
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; the test is skipped where there is none."""
    from playwright.sync_api import sync_playwright

    if not (chromium := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()
