"""Find what a run would trip over: the machine, the model folder, every record and its media."""

import argparse
import json
import sys
from pathlib import Path

from train.commands.options import options_of
from train.errors import OmniTuneError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's words."""
    parser.add_argument("options", nargs="*", help="options as in training: +recipe=full data.train=photos.jsonl")
    parser.add_argument("--json", type=Path, help="write all that was found to this file, as JSON")


def run(chosen: argparse.Namespace) -> None:
    """Print what was found; exit code 0: all is well, 1: training would be refused, 3: records would be left out."""
    options, _ = options_of(chosen.options)

    from train.engine.accelerator import quieten
    from train.preflight.doctor import as_text, examine_run

    quieten()
    report = examine_run(options)
    if chosen.json:
        try:
            chosen.json.write_text(json.dumps(report.values(), indent=2) + "\n")
        except OSError as error:
            raise OmniTuneError(f"--json: '{chosen.json}' cannot be written ({error}); name another file") from None
    print(as_text(report).encode(errors="backslashreplace").decode())
    sys.exit(report.exit_code)
