"""Puts the repository's root on the import path: tests find `train` and `tests` without an installation.

Property-based tests run the same few cases every time; `--hypothesis-profile=thorough` draws thousands.
"""

import sys
from datetime import timedelta
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

_SHARED = {"deadline": timedelta(seconds=60), "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", max_examples=150, derandomize=True, database=None, **_SHARED)
settings.register_profile("thorough", max_examples=3500, print_blob=True, **_SHARED)
settings.load_profile("quick")
