"""The four shapes that data takes on its way: Record -> Sample -> (plan) -> Batch.

Letters for tensor shapes, used everywhere:

    T  tokens          N  samples         M  supervised tokens
    S  slices          P  patches         Q  places of one slice (the resampler's queries)
    C  clips           F  mel frames      B  mel bins
    D  a width
"""

from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not learned."""

MediaSource = str | bytes
"""A picture or recording: the path of a file, or the encoded file itself."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a turn. `content` is the text itself, or the medium's source."""

    kind: Literal["text", "image", "audio"]
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
    patches: int = 0
    frames: int = 0
    """mel frames of all its clips, 10 ms each"""


@dataclass(slots=True)
class Sample:
    """A conversation as the model takes it: token ids, what is learned of them, media and their places.

    A token `t` with `labels[t] != IGNORE_INDEX` is learned: predicted from the tokens before it.
    """

    input_ids: Tensor
    """int64 (T,)"""
    labels: Tensor
    """int64 (T,): the token's own id where it is learned (not shifted), IGNORE_INDEX elsewhere."""
    loss_weights: Tensor
    """float32 (T,): the turn's weight where the token is learned, 0 elsewhere."""
    patches: Tensor
    """uint8 (P, 3·patch²): raw pixels of each patch, channel by channel, slice after slice."""
    slice_sizes: Tensor
    """int64 (S, 2): height and width of each slice in patches."""
    image_places: Tensor
    """int64 (S·Q,): token indices that the resampler's output replaces, in its order."""
    mel: Tensor
    """float32 (B, F): log-mel frames, 10 ms each, clip after clip."""
    clip_frames: Tensor
    """int64 (C,): mel frames of each clip (even)."""
    audio_places: Tensor
    """int64: token indices that the audio encoder's output replaces, in its order."""


@dataclass(slots=True)
class Batch:
    """Samples of one pack, flat: no padding anywhere. Places and positions count in the flat tokens."""

    input_ids: Tensor
    """int64 (T,)"""
    position_ids: Tensor
    """int64 (T,): starts again at 0 with each sample."""
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
    patches: Tensor
    """uint8 (P, 3·patch²)"""
    slice_sizes: Tensor
    """int64 (S, 2), on the CPU always: shapes are made of it."""
    image_places: Tensor
    """int64 (S·Q,)"""
    mel: Tensor
    """float32 (B, F)"""
    clip_frames: Tensor
    """int64 (C,), on the CPU always: shapes are made of it."""
    audio_places: Tensor
    """int64"""
    records: list[int] = field(default_factory=list)
    """Index of each sample's record in the data set."""

    _STAYS_ON_CPU = ("cu_seqlens", "slice_sizes", "clip_frames")

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device, copied without waiting where memory is pinned."""
        return self._map(lambda name, x: x if name in self._STAYS_ON_CPU else x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (what DataLoader calls)."""
        return self._map(lambda _, x: x.pin_memory())

    def _map(self, change) -> "Batch":
        moved = {}
        for item in fields(self):
            value = getattr(self, item.name)
            moved[item.name] = change(item.name, value) if isinstance(value, Tensor) else value
        return Batch(**moved)
