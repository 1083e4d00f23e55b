"""`import omnitune`: transformers' Auto classes then load our models; and what scripts call.

    from omnitune import Chat
    print("".join(Chat.load("outputs/full/latest").answer([{"role": "user", "content": "Hello"}])))

The code is the package `train` beside this one. It is imported by its place, so that a train.py in the user's folder
does not hide it.
"""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.errors import BadRecord, ConfigError, OmniTuneError
    from train.inference.chat import Chat

__all__ = ["BadRecord", "Chat", "ConfigError", "OmniTuneError"]

_PLACES = {
    "BadRecord": "train.errors",
    "Chat": "train.inference.chat",
    "ConfigError": "train.errors",
    "OmniTuneError": "train.errors",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name == "__version__":
        return import_module("train.commands.main").version()
    if name not in _PLACES:
        raise AttributeError(f"module 'omnitune' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(import_module(_PLACES[name]), name)


def _import_train() -> None:
    """Import our package `train`, whatever else of that name the import path holds."""
    ours = Path(__file__).resolve().parents[1] / "train" / "__init__.py"
    imported = sys.modules.get("train")
    if imported is not None:
        found = getattr(imported, "__file__", None)
        if found is None or Path(found).resolve() != ours:
            raise ImportError(
                f"'{found}' was imported as `train`, which is the name of OmniTune's own package; "
                "import omnitune first, or rename that file"
            )
        return
    spec = spec_from_file_location("train", ours, submodule_search_locations=[str(ours.parent)])
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)


_import_train()
import_module("train.auto")
