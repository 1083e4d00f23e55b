"""`omnitune <command>`: what can be done beside training."""

import argparse
import sys

from train.commands import chat, export
from train.errors import OmniTuneError

COMMANDS = {"chat": chat, "export": export}


def main(words: list[str] | None = None) -> None:
    """Run the command that the words name; a fault of the user's ends in one message and exit code 1."""
    parser = argparse.ArgumentParser(prog="omnitune", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").splitlines()[0]
        command.arguments(commands.add_parser(name, help=summary, description=summary))
    chosen = parser.parse_args(words)
    try:
        COMMANDS[chosen.command].run(chosen)
    except OmniTuneError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
