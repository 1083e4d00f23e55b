"""The OpenAI format: `messages` of `{"role", "content": str or [{"type": "text" | "image_url" | ...}]}`."""

from collections.abc import Mapping
from typing import Any

from train.data.formats.format import RecordFormat


class OpenAI(RecordFormat):
    """Turns under `messages`, each with its role; media as items of a turn's content."""

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        """By the key `messages`."""
        return "messages" in raw
