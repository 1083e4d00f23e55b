"""The chat template: from the turns of a conversation to segments, and from text to token ids.

There is one renderer, for training, evaluation and chat alike; what differs between model families is the
`ChatTemplate` that it is given.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal

from tokenizers import Tokenizer

from train.errors import BadRecord, CheckpointError
from train.schema import MediaSource, Part, Turn

_SHORT = 256
"""Longest text whose ids are remembered, in characters."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the rendered conversation.

    `content` is the literal text, the name of a special token, or the medium's source; `weight` is the loss
    weight of its tokens, 0 where nothing is learned.
    """

    kind: Literal["text", "special", "image", "audio"]
    content: MediaSource
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Special:
    """A special token, by its name."""

    name: str


Piece = str | Special


@dataclass(frozen=True, slots=True)
class RoleForm:
    """What stands before and after the content of a role's turns. What stands after is learned with it."""

    before: tuple[Piece, ...]
    after: tuple[Piece, ...]
    content_specials: tuple[str, ...] = ()
    """Special tokens that a text of this role may spell out; all others stay text."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How a model family writes a conversation."""

    roles: Mapping[str, RoleForm]
    default_system_prompt: str | None = None
    """Put first where a conversation has no system turn; None puts nothing."""
    audio_prefix: str = "Audio {number}: "
    """Text before each recording, numbered from 1."""
    media_suffix: str = "\n"
    """Text after each image and recording."""
    strips_texts: bool = False
    """Whether white space around each text is dropped."""
    required: frozenset[str] = field(init=False)
    """Names of the special tokens that a tokenizer must have."""

    def __post_init__(self) -> None:
        pieces = [piece for form in self.roles.values() for piece in form.before + form.after]
        names = frozenset(piece.name for piece in pieces if isinstance(piece, Special))
        object.__setattr__(self, "required", names)

    def render(
        self, turns: Sequence[Turn], *, system_prompt: str | None = None, generation_prompt: bool = False
    ) -> list[Segment]:
        """The conversation as segments, adjoining texts merged.

        Args:
            turns: as in a Record.
            system_prompt: instead of the default one, where the first turn is not the system's.
            generation_prompt: end with what an assistant's turn begins with.
        """
        prompt = self.default_system_prompt if system_prompt is None else system_prompt
        if prompt and not (turns and turns[0].role == "system"):
            turns = [Turn("system", (Part("text", prompt),)), *turns]
        return _merged(self._segments(turns, generation_prompt))

    def _segments(self, turns: Sequence[Turn], generation_prompt: bool) -> Iterator[Segment]:
        recordings = 0
        for turn in turns:
            form = self.roles.get(turn.role)
            if form is None:
                known = ", ".join(self.roles)
                raise BadRecord(
                    f"this model's conversations have no role '{turn.role}', only {known}; take the turn out"
                )
            weight = turn.weight if turn.role == "assistant" else 0.0
            yield from map(_literal, form.before)
            for part in turn.parts:
                if part.kind == "text":
                    text = str(part.content).strip() if self.strips_texts else str(part.content)
                    yield from _content(text, form.content_specials, weight)
                    continue
                if part.kind == "audio":
                    recordings += 1
                    yield Segment("text", self.audio_prefix.format(number=recordings))
                yield Segment(part.kind, part.content)
                yield Segment("text", self.media_suffix)
            for piece in form.after:
                yield _literal(piece, weight)
        if generation_prompt:
            yield from map(_literal, self.roles["assistant"].before)


def _literal(piece: Piece, weight: float = 0.0) -> Segment:
    if isinstance(piece, Special):
        return Segment("special", piece.name, weight)
    return Segment("text", piece, weight)


def _content(text: str, specials: tuple[str, ...], weight: float) -> Iterator[Segment]:
    """A part's text, with the special tokens that it may spell out taken as such."""
    if not specials:
        yield Segment("text", text, weight)
        return
    for piece in re.split(f"({'|'.join(map(re.escape, specials))})", text):
        if piece:
            yield Segment("special" if piece in specials else "text", piece, weight)


def _merged(segments: Iterator[Segment]) -> list[Segment]:
    merged: list[Segment] = []
    for (is_text, weight), group in groupby(segments, key=lambda segment: (segment.kind == "text", segment.weight)):
        if is_text:
            merged.append(Segment("text", "".join(str(segment.content) for segment in group), weight))
        else:
            merged += group
    return merged


class TextEncoder:
    """Token ids of plain text, in which nothing is taken for a special token; and ids of special tokens.

    It works on a copy of the tokenizer's backend, and can be pickled.

    Args:
        tokenizer: the backend, in its JSON form.
        required: special tokens that the tokenizer must have. Text never turns into one of them, even where
            the tokenizer does not mark them special.
        optional: special tokens that it may lack; they are then text.
    """

    def __init__(self, tokenizer: str, required: Sequence[str], optional: Sequence[str] = ()):
        self._arguments = tokenizer, tuple(required), tuple(optional)
        backend = Tokenizer.from_str(tokenizer)
        if lacking := [name for name in required if backend.token_to_id(name) is None]:
            raise CheckpointError(
                f"the tokenizer lacks the special token(s) {', '.join(lacking)}; use the one of this model"
            )
        ids = {name: backend.token_to_id(name) for name in (*required, *optional)}
        self._ids = {name: [index] for name, index in ids.items() if index is not None}
        backend.add_special_tokens(list(self._ids))
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        # The same few texts (roles, image numbers, line ends, questions) recur in every record.
        self._short = lru_cache(maxsize=4096)(self._encode)

    def text(self, text: str) -> list[int]:
        """Ids of a text; the list is shared, so it must not be changed."""
        return self._short(text) if len(text) <= _SHORT else self._encode(text)

    def special(self, name: str) -> list[int]:
        """The id of a special token, in a list; ids of its spelling if the tokenizer lacks it."""
        return self._ids[name] if name in self._ids else self.text(name)

    def _encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def __reduce__(self) -> Any:
        return TextEncoder, self._arguments
