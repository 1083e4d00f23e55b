"""Show a few records of each type as the model will see them, in an HTML page."""

import argparse
import shlex
from pathlib import Path

from train.commands.options import options_of
from train.errors import OmniTuneError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's words."""
    parser.add_argument("options", nargs="*", help="options as in training: +recipe=full data.train=photos.jsonl")
    parser.add_argument("--out", type=Path, default=Path("preview.html"), help="the page's file")
    parser.add_argument("--records", type=int, default=2, help="records of each type in each source")


def run(chosen: argparse.Namespace) -> None:
    """Write the page."""
    if chosen.records < 1:
        raise OmniTuneError(f"--records is {chosen.records}; it must be at least 1")
    options, _ = options_of(chosen.options)

    from train.checks.check import check_reading
    from train.engine.accelerator import quieten
    from train.pages.page import write_page
    from train.preflight.prepare import prepare
    from train.preflight.preview import preview

    quieten()
    check_reading(options)
    command = shlex.join(["omnitune", "preview", *chosen.options])
    page = preview(prepare(options), each=chosen.records, command=command)
    write_page(chosen.out, page)
    print(f"open {chosen.out.absolute().as_uri()}")
