"""Conversations with a model folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.data.collate import collate
from train.data.records import parse_messages
from train.families import find


@dataclass
class Chat:
    """A model and its processor."""

    model: Any
    processor: Any

    @classmethod
    def load(cls, folder: Path | str, *, system_prompt: str | None = None, device: str | None = None) -> "Chat":
        """From a model folder, onto CUDA where there is one."""
        family = find(folder)
        processor = family.load_processor(folder)
        if system_prompt is not None:
            processor.system_prompt = system_prompt
        model = family.load_model(folder).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model.eval(), processor)

    def ask(self, messages: Sequence[Mapping[str, Any]], *, max_new_tokens: int = 512, temperature: float = 0.0) -> str:
        """The answer to a conversation in the published form.

        messages: `{"role", "content"}`, content a string or `{"text", "image", "audio"}` with absolute paths.
        Raises BadRecord where a file cannot be used.
        """
        record = parse_messages(messages, root=Path("/"))
        batch = collate([self.processor.encode(record, generation_prompt=True)], [0], [0])
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        [ids] = self.model.generate(
            batch.to(next(self.model.parameters()).device), max_new_tokens=max_new_tokens, **sampling
        )
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
