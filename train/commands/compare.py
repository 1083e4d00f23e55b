"""Compare runs: figures with intervals, options that differ, records on which they disagree."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from train.commands.report import options_in
from train.errors import OmniTuneError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's words."""
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs; the first is what the others differ from")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="the page's file")


def run(chosen: argparse.Namespace) -> None:
    """Print a table, and write the page."""
    if len(chosen.runs) < 2:
        raise OmniTuneError(f"there is only '{chosen.runs[0]}' to compare; name two runs or more")
    compare_runs(chosen.runs, chosen.out)


def compare_runs(runs: Sequence[Path], out: Path) -> None:
    """Print a table of the runs' figures, and write the page that compares them."""
    from train.report.compare import as_text, compare, write_comparison

    comparison = compare(runs, [options_in(path) for path in runs])
    write_comparison(out, comparison)
    print(as_text(comparison))
    print(f"open {out.absolute().as_uri()}")
