"""`python -m omnitune <command>`: the command line where `omnitune` is not on the PATH."""

import omnitune  # noqa: F401  finds the package `train`
from train.commands.main import main

main()
