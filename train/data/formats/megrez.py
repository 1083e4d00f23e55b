"""The Megrez format: `conversations` of `{"role", "content": {"text", "image", "audio"} or str}`."""

from collections.abc import Mapping
from typing import Any

from train.data.formats.format import RecordFormat


class Megrez(RecordFormat):
    """Turns under `conversations`, each with its role; media in the turn they belong to."""

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        """By the key `conversations`."""
        return raw.get("conversations") is not None
