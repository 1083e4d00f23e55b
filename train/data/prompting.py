"""From conversations as programs hold them to the batch that asks a model for the next turn of each."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image, ImageOps

from train.data.collate import collate
from train.data.images import to_rgb
from train.data.records import parse_messages
from train.errors import BadRecord
from train.schema import Batch, Sample


class PromptMixin:
    """Adds `prompts` to a processor that encodes records."""

    encode: Callable[..., Sample]

    def prompts(self, conversations: Sequence[Sequence[Mapping[str, Any]]], *, max_tokens: int) -> Batch:
        """The batch that asks for the next turn of each conversation.

        Args:
            conversations: messages of `{"role", "content"}` as `records.parse_messages` takes them, their media in any
                of the forms of `embedded`; relative paths are those of the working folder.
            max_tokens: what the model takes, its answer included.

        Raises:
            BadRecord: if a message breaks a rule, a medium cannot be used, or a conversation is too long.
        """
        records = [parse_messages([embedded(message) for message in messages]) for messages in conversations]
        samples = [self.encode(record, generation_prompt=True) for record in records]
        if (longest := max(len(sample.input_ids) for sample in samples)) >= max_tokens:
            raise BadRecord(
                f"the conversation has {longest} tokens, and the model takes {max_tokens} with its answer; "
                "begin a new one, or give fewer images and shorter recordings"
            )
        return collate(samples, [0] * len(samples), range(len(samples)))


def embedded(value: Any) -> Any:
    """A message, or a part of one, with every image and recording in it as a path or an encoded file.

    An image may be a Pillow image. A recording may be a pair (samples, rate in Hz) as soundfile.read gives it:
    float samples in -1 to 1 or int16, of shape (samples,) or (samples, channels). Paths may be `Path`s.

    Raises:
        BadRecord: if a pair is no recording.
    """
    if isinstance(value, Mapping):
        return {key: embedded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [embedded(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Image.Image):
        file = BytesIO()
        to_rgb(ImageOps.exif_transpose(value)).save(file, "PNG", compress_level=1)
        return file.getvalue()
    return _wav(value) if isinstance(value, tuple) else value


def _wav(recording: tuple[Any, ...]) -> bytes:
    file = BytesIO()
    try:
        samples, rate = recording
        samples = np.asarray(samples)
        subtype = "FLOAT" if samples.dtype.kind == "f" else "PCM_16"
        soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    except (IndexError, TypeError, ValueError, soundfile.LibsndfileError) as error:
        raise BadRecord(
            f"audio given as a tuple cannot be used ({error}); give (samples, rate in Hz), samples in float or int16 "
            "and of shape (samples,) or (samples, channels)"
        ) from None
    return file.getvalue()
