"""Processors of models of text alone: a tokenizer and a chat template."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from train.data.encoding import RecordProcessor, load_tokenizer


class TextProcessor(RecordProcessor):
    """The tokenizer of a model folder, and the encoding of records with it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None):
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self._read_tokenizer(tokenizer)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **hub: Any) -> "TextProcessor":
        """The processor of a model folder (or Hub name); CheckpointError if its tokenizer cannot be used."""
        return cls(load_tokenizer(folder, **hub))
