"""Puts the repository's root on the import path: tests find `train` and `tests` without an installation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
