"""The four shapes that data takes on its way: Record -> Sample -> (plan) -> Batch.

Letters for tensor shapes, used everywhere:

    T  tokens          N  samples         M  supervised tokens
    U  units of media, the smallest pieces that a tower reads (a patch, a mel frame)
    I  items of media, which see nothing of each other (a slice of an image, a clip)
    D  a width
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""Label of a token that is not learned."""

Kind = Literal["image", "audio"]

KINDS: tuple[Kind, ...] = ("image", "audio")
"""The kinds of media, in the order in which tables have them."""

TooLong = Literal["quarantine", "cut_text"]
"""What becomes of a record that is too long: set aside, or its text shortened from the end."""

MediaFile = str | bytes
"""An image or recording: the path of a file, or the encoded file itself."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a recording, in seconds from the recording's start."""

    file: MediaFile
    start_s: float = 0.0
    end_s: float | None = None
    """None: the recording's end"""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A stretch of a recording that is too long for its tower as a whole, in samples at 16 kHz."""

    source: MediaFile | Span
    begin: int
    end: int
    total: int
    """samples of the whole recording"""
    clip: np.ndarray | None = None
    """float32 (end - begin,): its samples; None where only headers were read, and `begin` and `end` are provisional"""


MediaSource = MediaFile | Span | Window


def file_of(source: MediaSource) -> MediaFile:
    """The file that an image or a recording comes from."""
    while not isinstance(source, MediaFile):
        source = source.source if isinstance(source, Window) else source.file
    return source


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a turn. `content` is the text itself, or the medium's source."""

    kind: Literal["text"] | Kind
    content: MediaSource


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: its parts in the order in which the model sees them.

    `weight` scales the loss of an assistant's turn: 1 learned, 0 not learned.
    """

    role: str
    parts: tuple[Part, ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Record:
    """One checked conversation, and where it was found (`line` counts from 1).

    `type` is the record's own word for its kind ("speech", "caption", ...), by which evaluation groups.
    """

    turns: tuple[Turn, ...]
    file: str = ""
    line: int = 0
    type: str = ""


@dataclass(frozen=True, slots=True)
class Lengths:
    """What a record will cost, known before its media are decoded."""

    tokens: int
    units: Mapping[Kind, int] = field(default_factory=dict)
    """units of each kind of media that it holds"""

    def row(self) -> tuple[int, ...]:
        """Tokens, then the units of each of KINDS: a row of a table of lengths."""
        return (self.tokens, *(self.units.get(kind, 0) for kind in KINDS))


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of an image that its tower reads on its own."""

    box: tuple[float, float, float, float]
    """left, top, right, bottom, as shares of the image's width and height"""
    pixels: tuple[int, int]
    """width and height to which the part is resized"""


@dataclass(frozen=True, slots=True)
class Placed:
    """An image or audio clip among the tokens of a record: it fills those from `begin` to before `end`."""

    kind: Kind
    source: MediaSource
    begin: int
    end: int
    places: tuple[int, ...]
    """token indices that the tower's output replaces"""
    slices: tuple[Slice, ...] = ()
    """of an image, equally many places each, in order; empty where its processor does not tell them"""
    seconds: float | None = None
    """of a clip, what the model hears of it; None where its processor does not tell"""
    units: int = 0
    """what it costs its tower"""


@dataclass(frozen=True, slots=True)
class Outline:
    """A record laid out as tokens: what `Processor.encode` gives, without what the towers read."""

    input_ids: Sequence[int]
    weights: Sequence[float]
    """of each token, 0 where it is not learned"""
    media: Sequence[Placed]


@dataclass(slots=True)
class Media:
    """The media of one kind in a sample or a batch, item after item without padding, and where they belong."""

    values: Tensor
    """(U, ...): what the tower reads, a row for each unit"""
    sizes: Tensor
    """int64 (I, ...), on the CPU always, since shapes are made of it: the size of each item in units"""
    places: Tensor
    """int64: token indices that the tower's output replaces, in its order"""

    @classmethod
    def joined(cls, media: Sequence["Media"], starts: Sequence[int]) -> "Media":
        """The media of several samples as those of one, whose tokens begin at `starts`."""
        return cls(
            values=torch.cat([item.values for item in media]),
            sizes=torch.cat([item.sizes for item in media]),
            places=torch.cat([item.places + start for item, start in zip(media, starts, strict=True)]),
        )


@dataclass(slots=True)
class Sample:
    """A conversation as the model takes it: token ids, what is learned of them, media and their places.

    A token `t` with `labels[t] != IGNORE_INDEX` is learned: predicted from the tokens before it.
    """

    input_ids: Tensor
    """int64 (T,)"""
    position_ids: Tensor
    """int64 (T,) or (R, T): one or several rows of positions, as the model family has them"""
    labels: Tensor
    """int64 (T,): the token's own id where it is learned (not shifted), IGNORE_INDEX elsewhere."""
    loss_weights: Tensor
    """float32 (T,): the turn's weight where the token is learned, 0 elsewhere."""
    media: dict[Kind, Media] = field(default_factory=dict)
    """of the kinds that the conversation holds"""


@dataclass(slots=True)
class Batch:
    """Samples of one pack, flat: no padding anywhere. Places count in the flat tokens, positions in each sample."""

    input_ids: Tensor
    """int64 (T,)"""
    position_ids: Tensor
    """int64 (T,) or (R, T): begins again with each sample."""
    cu_seqlens: Tensor
    """int32 (N + 1,), on the CPU always: where each sample begins, and the end."""
    target_positions: Tensor
    """int64 (M,): tokens whose hidden state predicts a learned token (its predecessors)."""
    targets: Tensor
    """int64 (M,): the learned tokens."""
    loss_weights: Tensor
    """float32 (M,)"""
    target_sources: Tensor
    """int64 (M,): index of the data source that each learned token came from."""
    media: dict[Kind, Media] = field(default_factory=dict)
    """of the kinds that some sample holds"""
    records: list[int] = field(default_factory=list)
    """Index of each sample's record in the data set."""

    def units(self, kind: Kind) -> int:
        """Units of a kind of media in the whole pack."""
        return len(self.media[kind].values) if kind in self.media else 0

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device, copied without waiting where memory is pinned."""
        return self._map(lambda x: x.to(device, non_blocking=True), on_cpu=lambda x: x)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (what DataLoader calls)."""
        return self._map(Tensor.pin_memory, on_cpu=Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor], on_cpu: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        changed |= {name: change(value) for name, value in changed.items() if isinstance(value, Tensor)}
        changed["cu_seqlens"] = on_cpu(self.cu_seqlens)
        changed["media"] = {
            kind: Media(change(media.values), on_cpu(media.sizes), change(media.places))
            for kind, media in self.media.items()
        }
        return Batch(**changed)


class Changes(Protocol):
    """Random changes of a record's media in training. They are drawn in the order in which media are decoded."""

    speed: float
    """of all its clips; it changes their lengths"""

    def sound(self, clip: np.ndarray, samples: int) -> np.ndarray:
        """A clip at 16 kHz as it is heard: float32 (samples,), its length at that speed."""
        ...

    def mel(self, mel: Tensor) -> Tensor:
        """The log-mel frames of a clip, (frames, bins)."""
        ...

    def image(self, image: "Image") -> "Image":
        """An RGB image of the same size."""
        ...


class Processor(Protocol):
    """A model folder's way from records to samples: tokenizer, chat template, and media if its model takes any."""

    tokenizer: "PreTrainedTokenizerBase"
    system_prompt: str | None
    """Put first where a conversation has no system turn; None takes the family's, "" none."""
    long_audio: str
    """What becomes of a clip that is longer than the model takes: `quarantine`, `cut` or `split`."""

    @property
    def roles(self) -> Collection[str]:
        """The roles that a conversation may have."""
        ...

    def measure(
        self,
        record: Record,
        *,
        max_tokens: int | None = None,
        too_long: TooLong = "quarantine",
        speed: float = 1.0,
    ) -> Lengths:
        """The lengths that `encode` will give with clips at that speed, from headers alone; BadRecord where it would
        fail for its length.
        """
        ...

    def outline(
        self,
        record: Record,
        *,
        max_tokens: int | None = None,
        too_long: TooLong = "quarantine",
        decode_media: bool = False,
    ) -> Outline:
        """The tokens and the places of media that `encode` will give, from headers alone; BadRecord as in `measure`.

        decode_media: decode the media too; BadRecord as in `encode`.
        """
        ...

    def encode(
        self,
        record: Record,
        *,
        max_tokens: int | None = None,
        too_long: TooLong = "quarantine",
        changes: Changes | None = None,
    ) -> Sample:
        """The record with its media decoded, and changed; BadRecord if it is too long, or a medium cannot be used."""
        ...

    def prompt(self, record: Record, *, max_tokens: int | None = None) -> Sample:
        """The conversation up to its last answer, ending with the generation prompt."""
        ...

    def reference(self, record: Record) -> str:
        """The text of the last answer."""
        ...

    def prompts(self, conversations: Sequence[Sequence[Mapping[str, Any]]], *, max_tokens: int) -> Batch:
        """The batch that asks for the next turn of each conversation, given as messages."""
        ...
