"""Conversations with a model folder: what `omnitune chat` and `omnitune demo` stand on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from train.errors import OmniTuneError
from train.families.registry import find
from train.inference.search import LocalSearch, Searched, answer
from train.modules.packed import PackedModel
from train.schema import Kind


@dataclass
class Chat:
    """A model with its processor, ready to answer."""

    model: PackedModel
    media: frozenset[Kind]
    """What the model takes beside text."""

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        system_prompt: str | None = None,
        long_audio: str | None = None,
        device: str | None = None,
    ) -> "Chat":
        """From a model folder, onto CUDA where there is one.

        system_prompt: in place of the model's own; "" for none.
        long_audio: what becomes of long recordings, as `data.long_audio`; None = as the folder says.
        """
        family = find(folder)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = family.load_model(folder, device=where)
        model.processor = family.load_processor(folder)
        if system_prompt is not None:
            model.processor.system_prompt = system_prompt
        if long_audio is not None:
            model.processor.long_audio = long_audio
        return cls(model.eval(), frozenset(family.media.values()))

    def answer(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        **options: Any,
    ) -> Iterator[str]:
        """The next turn of a conversation, piece by piece.

        Args:
            messages: as `MegrezO.chat` takes them.
            max_new_tokens: tokens of the answer at most.
            temperature: 0 = always the likeliest token.
            options: others of `MegrezO.chat` (top_p, repetition_penalty, ...).

        Raises:
            BadRecord: where a message or its media cannot be used.
        """
        return self._next_turn(max_new_tokens, temperature, options)(messages, stream=True)

    def answer_by_search(
        self,
        messages: Sequence[Mapping[str, Any]],
        search: LocalSearch,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        **options: Any,
    ) -> Iterator[Searched | str]:
        """The searches that the model makes for a question, then its answer; arguments as for `answer`.

        Raises OmniTuneError for a model whose family knows no function calls.
        """
        if "observation" not in self.model.processor.roles:
            raise OmniTuneError("this model's family knows no function calls, so it cannot search")
        next_turn = partial(self._next_turn(max_new_tokens, temperature, options), skip_special_tokens=False)
        return answer(next_turn, messages, search, now=datetime.now())

    def _next_turn(self, max_new_tokens: int, temperature: float, options: dict[str, Any]) -> Callable[..., Any]:
        sampling: dict[str, Any] = {"sampling": temperature > 0, "temperature": temperature}
        return partial(self.model.chat, max_new_tokens=max_new_tokens, **sampling, **options)
