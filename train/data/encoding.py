"""From a `Record` to its lengths and to a `Sample`: what the processors of all model families share."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from train.data.audio import SAMPLE_RATE, clip_length, load_fitted, samples_at, speed_ratio
from train.data.chat_template import ChatTemplate, Segment, TextEncoder
from train.data.images import load_image
from train.data.prompting import PromptMixin
from train.errors import BadRecord, CheckpointError
from train.schema import (
    IGNORE_INDEX,
    KINDS,
    Changes,
    Kind,
    Lengths,
    Media,
    MediaSource,
    Outline,
    Placed,
    Record,
    Sample,
    Slice,
    TooLong,
    Turn,
    Window,
    file_of,
)


@dataclass(slots=True)
class Medium:
    """An image or clip among the tokens: the tokens [begin, end) that it fills, and its places in them."""

    kind: Kind
    source: MediaSource
    size: Any
    """what the header told: of a clip its samples at 16 kHz, of an image in the family's own form"""
    begin: int
    end: int
    places: np.ndarray


@dataclass(slots=True)
class Tokens:
    """A conversation laid out as tokens, its media not yet decoded."""

    speed: float = 1.0
    """of the clips in it"""
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    media: list[Medium] = field(default_factory=list)

    def extend(self, ids: list[int], weight: float = 0.0) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)

    def cut(self, limit: int) -> None:
        """Drop the tokens from `limit` on, and a medium as a whole where that falls inside it."""
        for begin, end in self._wholes():
            if begin < limit < end:
                limit = begin
        del self.ids[limit:], self.weights[limit:]
        self.media = [medium for medium in self.media if medium.end <= limit]

    def _wholes(self) -> Iterator[tuple[int, int]]:
        """Where each image and recording begins and ends; the windows of a recording are one."""
        begin: int | None = None
        for medium in self.media:
            begin = medium.begin if begin is None else begin
            if not isinstance(medium.source, Window) or medium.source.end == medium.source.total:
                yield begin, medium.end
                begin = None

    def of(self, kind: Kind) -> list[Medium]:
        """The media of a kind, in order."""
        return [medium for medium in self.media if medium.kind == kind]


class RecordProcessor(PromptMixin):
    """Lays records out as tokens by a chat template; a model of text alone takes no media.

    A processor of media overrides `_lay_out_medium`, `_units` and `_features`, and what it can tell of `_slices` and
    `_seconds`; one that cuts long recordings `_longest_clip`, one that splits them `_split`; one of several rows of
    positions `_positions`.
    """

    template: ChatTemplate
    system_prompt: str | None
    """Put first where a conversation has no system turn; None takes the template's, "" none."""

    @property
    def roles(self) -> Collection[str]:
        """The roles that a conversation may have."""
        return self.template.roles

    def _read_tokenizer(self, tokenizer: PreTrainedTokenizerBase, specials: Sequence[str] = ()) -> None:
        """Take over a tokenizer, which must have the template's special tokens and `specials`."""
        names = [*sorted(self.template.required), *specials]
        optional = [name for form in self.template.roles.values() for name in form.content_specials]
        self._encoder = TextEncoder(tokenizer.backend_tokenizer.to_str(), names, optional)
        ids = tokenizer("a")["input_ids"]
        self._begin = ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            raise CheckpointError(
                f"the tokenizer ends each text with '{tokenizer.eos_token}', and here the chat template does that; "
                "set add_eos_token to false in tokenizer_config.json"
            )

    def measure(
        self,
        record: Record,
        *,
        max_tokens: int | None = None,
        too_long: TooLong = "quarantine",
        speed: float = 1.0,
    ) -> Lengths:
        """The lengths that `encode` will give with clips at that speed, from headers alone.

        What is too long fails here already.
        """
        with _located(record):
            tokens = self._lay_out(record, False, max_tokens, too_long, speed=speed)
        return Lengths(len(tokens.ids), {kind: sum(map(self._units, media)) for kind, media in _by_kind(tokens)})

    def outline(
        self,
        record: Record,
        *,
        max_tokens: int | None = None,
        too_long: TooLong = "quarantine",
        decode_media: bool = False,
    ) -> Outline:
        """The tokens and the places of media that `encode` will give: from headers, and the sound of what is split.

        decode_media: decode the others too, so that what `encode` would refuse is refused.
        """
        with _located(record):
            tokens = self._lay_out(record, False, max_tokens, too_long, decode=True)
            for medium in tokens.media if decode_media else ():
                self._decoded(medium, None)
        media = [
            Placed(
                medium.kind,
                medium.source,
                medium.begin,
                medium.end,
                tuple(medium.places.tolist()),
                self._slices(medium),
                self._seconds(medium),
                self._units(medium),
            )
            for medium in tokens.media
        ]
        return Outline(tokens.ids, tokens.weights, media)

    def encode(
        self,
        record: Record,
        *,
        generation_prompt: bool = False,
        max_tokens: int | None = None,
        too_long: TooLong = "quarantine",
        changes: Changes | None = None,
    ) -> Sample:
        """The record as the model takes it, its media decoded.

        Args:
            generation_prompt: end with the beginning of an assistant's turn; such a prompt is never cut.
            max_tokens: the most tokens; None = no limit.
            too_long: refuse a longer record, or cut its end, never inside an image or clip.
            changes: of its media, in training.

        Raises:
            BadRecord: with the record's place, if it is too long, or a medium cannot be used.
        """
        with _located(record):
            speed = changes.speed if changes else 1.0
            tokens = self._lay_out(
                record, generation_prompt, max_tokens, too_long, decode=True, speed=speed, changes=changes
            )
            media = {kind: self._media(held, changes) for kind, held in _by_kind(tokens)}
        input_ids = torch.tensor(tokens.ids)
        loss_weights = torch.tensor(tokens.weights)
        return Sample(
            input_ids=input_ids,
            position_ids=self._positions(tokens),
            labels=input_ids.where(loss_weights > 0, IGNORE_INDEX),
            loss_weights=loss_weights,
            media=media,
        )

    def prompt(self, record: Record, *, max_tokens: int | None = None) -> Sample:
        """The conversation up to its last assistant turn, ending with the generation prompt."""
        turns = record.turns[: _last_answer(record)]
        asked = Record(turns, record.file, record.line, record.type)
        return self.encode(asked, generation_prompt=True, max_tokens=max_tokens)

    def reference(self, record: Record) -> str:
        """The text of the last assistant turn: what an answer to `prompt` is compared with."""
        answer = _last_answer(record)
        return "" if answer is None else "".join(str(part.content) for part in record.turns[answer].parts)

    def _lay_out(
        self,
        record: Record,
        generation_prompt: bool,
        max_tokens: int | None,
        too_long: TooLong,
        *,
        decode: bool = False,
        speed: float = 1.0,
        changes: Changes | None = None,
    ) -> Tokens:
        """The record as tokens; decode: whether recordings that are split are decoded, so that their cuts are right."""
        tokens = Tokens(speed)
        turns = self._split(record.turns, speed, decode, changes)
        tokens.extend(self._begin)
        for segment in self.template.render(
            turns, system_prompt=self.system_prompt, generation_prompt=generation_prompt
        ):
            if segment.kind == "text":
                tokens.extend(self._encoder.text(str(segment.content)), segment.weight)
            elif segment.kind == "special":
                tokens.extend(self._encoder.special(str(segment.content)), segment.weight)
            else:
                self._lay_out_medium(tokens, segment)
        length = len(tokens.ids)
        if max_tokens is None or length <= max_tokens:
            return tokens
        if too_long == "quarantine" or generation_prompt:
            raise BadRecord(
                f"it has {length} tokens, more than {max_tokens}{_told_windows(tokens)}; shorten it, "
                "raise data.max_tokens, or set data.too_long=cut_text"
            )
        tokens.cut(max_tokens)
        if not any(tokens.weights):
            raise BadRecord(f"of its {length} tokens the first {max_tokens} hold nothing that is learned; shorten it")
        return tokens

    def _split(self, turns: tuple[Turn, ...], speed: float, decode: bool, changes: Changes | None) -> tuple[Turn, ...]:
        """The turns with the windows of each recording that is split in its place; decode: as in `_lay_out`."""
        return turns

    def _heard_length(self, source: MediaSource, speed: float) -> int:
        """Samples at 16 kHz of a clip at that speed, from its header; BadRecord if it cannot be read."""
        samples = clip_length(source)  # a window has its speed already
        return samples if speed == 1 or isinstance(source, Window) else samples_at(speed, samples)

    def _heard(self, source: MediaSource, samples: int, changes: Changes | None, *, is_cut: bool = False) -> np.ndarray:
        """A clip as the model hears it: float32 (samples,); is_cut: as for `load_fitted`."""
        if isinstance(source, Window) or changes is None:
            return load_fitted(source, samples, is_cut=is_cut)
        own = clip_length(source)
        if is_cut:
            rate, at = speed_ratio(changes.speed)
            own = min(own, samples * rate // at + 1)
        return changes.sound(load_fitted(source, own, is_cut=is_cut), samples)[:samples]

    def _lay_out_medium(self, tokens: Tokens, segment: Segment) -> None:
        """Add an image's or clip's places."""
        raise BadRecord(f"it holds an {segment.kind}, and this model reads text alone; take it out")

    def _add_medium(self, tokens: Tokens, segment: Segment, size: Any, names: Sequence[str], count: int) -> None:
        """Add a medium that has `count` places; names: of the tokens that open it, hold a place, and close it."""
        opening, place, closing = map(self._encoder.special, names)
        begin = len(tokens.ids)
        tokens.extend(opening + place * count + closing)
        places = begin + len(opening) + np.arange(count)
        kind = cast(Kind, segment.kind)
        tokens.media.append(Medium(kind, segment.content, size, begin, len(tokens.ids), places))

    def _units(self, medium: Medium) -> int:
        """What a medium costs its tower, known before it is decoded."""
        raise NotImplementedError

    def _slices(self, medium: Medium) -> tuple[Slice, ...]:
        """The parts of an image that the tower reads one by one; none where that is not told."""
        return ()

    def _seconds(self, medium: Medium) -> float | None:
        """How much of a clip the tower hears; None where that is not told."""
        return None

    @property
    def _longest_clip(self) -> int | None:
        """Samples after which recordings are cut; None where they are not."""
        return None

    def _decoded(self, medium: Medium, changes: Changes | None) -> Image.Image | np.ndarray:
        """An image, RGB and upright, or a clip, float32 (samples,), changed; BadRecord if it cannot be used."""
        if medium.kind == "image":
            image = load_image(file_of(medium.source))
            return changes.image(image) if changes else image
        return self._heard(medium.source, medium.size, changes, is_cut=medium.size == self._longest_clip)

    def _features(self, medium: Medium, decoded: Any) -> tuple[Tensor, Tensor]:
        """What the tower reads of a decoded medium, (U, ...), and the sizes (I, ...) of its items."""
        raise NotImplementedError

    def _positions(self, tokens: Tokens) -> Tensor:
        """int64 (T,), or (R, T) for a model with several rows of positions."""
        return torch.arange(len(tokens.ids))

    def _read(self, medium: Medium, changes: Changes | None) -> tuple[Tensor, Tensor]:
        """`_features` of a medium, changed."""
        values, sizes = self._features(medium, self._decoded(medium, changes))
        return changes.mel(values) if changes and medium.kind == "audio" else values, sizes

    def _media(self, media: list[Medium], changes: Changes | None) -> Media:
        read = [self._read(medium, changes) for medium in media]
        return Media(
            values=torch.cat([values for values, _ in read]),
            sizes=torch.cat([sizes for _, sizes in read]),
            places=torch.from_numpy(np.concatenate([medium.places for medium in media])),
        )


def load_tokenizer(folder: str | Path, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hub name; CheckpointError if it cannot be loaded."""
    try:
        # Without an answer, transformers asks on the terminal whether the folder's own code may run.
        return AutoTokenizer.from_pretrained(str(folder), **{"trust_remote_code": False} | hub)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer of '{folder}' cannot be loaded ({error})") from error


def _by_kind(tokens: Tokens) -> list[tuple[Kind, list[Medium]]]:
    return [(kind, media) for kind in KINDS if (media := tokens.of(kind))]


def _told_windows(tokens: Tokens) -> str:
    """How much of a record that is too long its split recordings are; nothing where there are none."""
    held = [(medium.source, len(medium.places)) for medium in tokens.media if isinstance(medium.source, Window)]
    if not held:
        return ""
    seconds = sum(window.end - window.begin for window, _ in held) / SAMPLE_RATE
    places = sum(count for _, count in held)
    return f" ({places} of them are {seconds:.1f} s of audio in {len(held)} windows)"


def _last_answer(record: Record) -> int | None:
    answers = [index for index, turn in enumerate(record.turns) if turn.role == "assistant"]
    return answers[-1] if answers else None


@contextmanager
def _located(record: Record) -> Iterator[None]:
    """Put the record's place before the reason of a BadRecord."""
    try:
        yield
    except BadRecord as fault:
        if not record.file:
            raise
        raise BadRecord(f"{record.file}:{record.line}: {fault}") from None
