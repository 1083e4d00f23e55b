"""The ALLaVA and LLaVA format: `image`, `audio`, and `conversations` of `{"from", "value"}` with tags."""

from collections.abc import Mapping
from typing import Any

from train.data.formats.format import RecordFormat, entries


class Llava(RecordFormat):
    """Turns by speaker, the record's media where `<image>` and `<audio>` stand in them."""

    role_key = "from"
    content_key = "value"
    roles = {"human": "user", "gpt": "assistant", "system": "system", "observation": "observation"}  # noqa: RUF012
    has_tags = True

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        """By turns with `from`."""
        return any(isinstance(entry, dict) and entry.get("from") is not None for entry in entries(raw))
