"""Conversations with images and recordings of odd sizes, and packs of them."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from train.data.collate import collate
from train.data.encoding import RecordProcessor
from train.schema import Batch, Part, Record, Sample, Turn

RATE = 16_000


def image(width: int, height: int, seed: int = 0) -> bytes:
    """An image of noise, as a PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def clip(samples: int, seed: int = 0) -> bytes:
    """A recording of noise at 16 kHz, as a WAV of float samples."""
    file = BytesIO()
    soundfile.write(file, sound(samples, seed), RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def sound(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def record(*turns: tuple[str, Sequence[Any]]) -> Record:
    """A conversation; a part is a text, ("image", (width, height)) or ("audio", samples)."""
    return Record(tuple(Turn(role, tuple(_part(part, n) for n, part in enumerate(parts))) for role, parts in turns))


def _part(part: Any, seed: int) -> Part:
    if isinstance(part, str):
        return Part("text", part)
    kind, size = part
    return Part(kind, image(*size, seed) if kind == "image" else clip(size, seed))


MIXED = [
    record(("user", ["What is it?"]), ("assistant", ["A cat."])),
    record(("user", [("image", (97, 201)), ("image", (300, 61)), "Which?"]), ("assistant", ["The second one."])),
    record(("user", [("audio", 33_333), "and", ("audio", 8_000), ("audio", 64_161)]), ("assistant", ["three"])),
    record(
        ("system", ["Be brief."]),
        ("user", ["Look: ", ("image", (150, 150)), ("audio", 49_000), "What?"]),
        ("assistant", ["A small red one."]),
        ("user", [("audio", 1_000), "And this? ", ("image", (60, 280))]),
        ("assistant", ["island"]),
    ),
    record(("user", ["Which colour has the sky?"]), ("assistant", ["blue"])),
]


def samples(processor: RecordProcessor) -> list[Sample]:
    """Every mix: text, several images, several clips, all in several turns, text."""
    return [processor.encode(one) for one in MIXED]


def packed(found: Sequence[Sample]) -> Batch:
    """The samples in one pack."""
    return collate(list(found), [0] * len(found), range(len(found)))
