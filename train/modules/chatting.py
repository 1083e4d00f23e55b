"""Conversations in, answers out: what every model that answers a `schema.Batch` can do."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from threading import Event
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoProcessor, StoppingCriteria, TextIteratorStreamer

from train.schema import Batch, Processor

Messages = Sequence[Mapping[str, Any]]


class ChatMixin:
    """Adds `chat` to a transformers model whose `generate` answers the prompts of a Batch."""

    config: Any
    device: Any
    generate: Any

    @cached_property
    def processor(self) -> Processor:
        """The processor of the folder that the model came from; it may be set to another."""
        is_remote_code = type(self).__module__.startswith("transformers_modules.")
        return AutoProcessor.from_pretrained(self.config.name_or_path, trust_remote_code=is_remote_code)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: bool = False,
        max_new_tokens: int = 512,
        temperature: float | None = None,
        top_p: float | None = None,
        stream: bool = False,
        skip_special_tokens: bool = True,
        **options: Any,
    ) -> str | list[str] | Iterator[str]:
        """The model's next turn.

        Args:
            messages: `{"role", "content"}` each; content is a text, a mapping `{"text", "image", "audio"}`, or a list
                of `{"type": "text" | "image" | "image_url" | "audio" | "audio_url" | "input_audio", ...}`. Images
                are paths, Pillow images, bytes or data URLs; recordings paths, (samples, rate), bytes or data URLs.
                Several conversations may be given as a list of such lists; they are answered together.
            sampling: draw tokens; else the likeliest is taken each time, as at temperature 0.
            max_new_tokens: tokens of the answer at most.
            temperature, top_p: of sampling; None = the model's own.
            stream: give the text piece by piece while it is generated. Closing the iterator ends the generation.
            skip_special_tokens: False spells them out, such as those of a function call.
            options: others of transformers' `generate` (repetition_penalty, top_k, ...).

        Returns:
            The text; a list of texts for a list of conversations; an iterator of pieces when streaming.

        Raises:
            BadRecord: (a ValueError) if a message breaks a rule, or an image or recording cannot be used.

        >>> model.chat([{"role": "user", "content": {"text": "What is it?", "image": "cat.jpg"}}])  # doctest: +SKIP
        'A cat.'
        """
        is_batch = bool(messages) and not isinstance(messages[0], Mapping)
        if stream and is_batch:
            raise ValueError("one conversation can be streamed, not a list of them; ask them one by one")
        conversations = cast(Sequence[Messages], messages if is_batch else [messages])
        batch = self.processor.prompts(conversations, max_tokens=self.config.max_position_embeddings).to(self.device)
        options |= {"max_new_tokens": max_new_tokens, "do_sample": sampling and temperature != 0}
        if options["do_sample"]:
            given = {"temperature": temperature, "top_p": top_p}
            options |= {name: value for name, value in given.items() if value is not None}
        if stream:
            return self._pieces(batch, options, skip_special_tokens)
        decode = partial(self.processor.tokenizer.decode, skip_special_tokens=skip_special_tokens)
        answers = [str(decode(ids)) for ids in self.generate(batch, **options)]
        return answers if is_batch else answers[0]

    def _pieces(self, batch: Batch, options: dict[str, Any], skip_special_tokens: bool) -> Iterator[str]:
        """The answer's text as it is generated in a thread, which ends with this iterator."""
        tokenizer = self.processor.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=skip_special_tokens)
        stop = _Stop()
        with ThreadPoolExecutor(1) as thread:
            answering = thread.submit(self.generate, batch, streamer=streamer, stopping_criteria=[stop], **options)
            answering.add_done_callback(lambda _: streamer.end())  # also after a fault, which `result` raises
            try:
                yield from filter(None, streamer)
            finally:
                stop.asked.set()
            answering.result()


class _Stop(StoppingCriteria):
    """Ends a generation when asked to."""

    def __init__(self) -> None:
        self.asked = Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)
