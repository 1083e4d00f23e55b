"""Write the page that shows how a run goes, or went."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from train.errors import OmniTuneError

if TYPE_CHECKING:
    from train.config import Options


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's words."""
    parser.add_argument("run", type=Path, help="folder of a run: finished, running or killed")
    parser.add_argument("--out", type=Path, help="the page's file; default: report.html in the run's folder")


def run(chosen: argparse.Namespace) -> None:
    """Write the page."""
    from train.report.report import write_report
    from train.run_folder import RunFolder

    out = chosen.out or RunFolder(chosen.run).report
    write_report(chosen.run, options_in(chosen.run), out=out)
    print(f"open {out.absolute().as_uri()}")


def options_in(path: Path) -> "Options | None":
    """A run's options; None, with a word about it, where this version cannot read them."""
    from train.commands.options import read_options
    from train.run_folder import RunFolder

    try:
        return read_options(RunFolder(path).config)
    except OmniTuneError as error:
        print(f"without options and media: {error}", file=sys.stderr)
        return None
