"""`omnitune <command>`: what can be done beside training."""

import argparse
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType

from train.commands import certify, chat, compare, demo, doctor, evaluate, export, plan, preview, report
from train.errors import message_for_user
from train.families.family import quieten_transformers
from train.launcher.failure import report_failure

COMMANDS: dict[str, ModuleType] = {
    "certify": certify,
    "chat": chat,
    "compare": compare,
    "demo": demo,
    "doctor": doctor,
    "evaluate": evaluate,
    "export": export,
    "plan": plan,
    "preview": preview,
    "report": report,
}


def version() -> str:
    """The installed version; in a checkout that is not installed, what its pyproject.toml says."""
    try:
        return metadata.version("omnitune")
    except metadata.PackageNotFoundError:
        file = Path(__file__).resolve().parents[2] / "pyproject.toml"
        return str(tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"])


def main(words: list[str] | None = None) -> None:
    """Run the command that the words name; a fault of the user's ends in one message and exit code 1."""
    words = sys.argv[1:] if words is None else words
    summaries = {name: (command.__doc__ or "").splitlines()[0] for name, command in COMMANDS.items()}
    listed = "\n".join(f"  {name:10} {summary}" for name, summary in summaries.items())
    parser = argparse.ArgumentParser(
        prog="omnitune",
        description=f"commands:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"omnitune {version()}")
    parser.add_argument("command", choices=COMMANDS)
    if not words:
        parser.print_help()
        return
    name = parser.parse_args(words[:1]).command

    parser = argparse.ArgumentParser(prog=f"omnitune {name}", description=summaries[name])
    COMMANDS[name].arguments(parser)
    # Intermixed, so that a question may stand behind --image and --audio.
    chosen = parser.parse_intermixed_args(words[1:])
    quieten_transformers()
    with report_failure(message_for_user):
        COMMANDS[name].run(chosen)


if __name__ == "__main__":
    main()
