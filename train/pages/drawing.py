"""Images and sound as text that stands inside a page: data URIs and SVG paths."""

import io
from base64 import b64encode

import numpy as np
import soundfile
from PIL import Image
from torch import Tensor

from train.data.audio import SAMPLE_RATE

_COLUMNS = 300
"""Columns of a waveform."""

_MP3_LEVEL = 0.9
"""From 0, the highest bit rate, to 1, the lowest."""

_SCALE = np.array([(8, 10, 40), (92, 28, 110), (205, 70, 80), (250, 160, 50), (252, 255, 190)], np.float64)
"""Colours of a mel from silence to the loudest."""


def data_uri(kind: str, data: bytes) -> str:
    """Encoded bytes as an address that holds them."""
    return f"data:{kind};base64,{b64encode(data).decode()}"


def image_uri(image: Image.Image, side: int = 720, lossless: int = 256) -> str:
    """An RGB image, scaled down to at most `side` pixels a side; as PNG up to `lossless` pixels, else as JPEG."""
    small = image.copy()
    small.thumbnail((side, side))
    form = "PNG" if max(small.size) <= lossless else "JPEG"
    file = io.BytesIO()
    small.save(file, form)
    return data_uri(f"image/{form.lower()}", file.getvalue())


def clip_uri(clip: np.ndarray) -> str:
    """A clip at 16 kHz, float32 (samples,), as FLAC; samples beyond full scale are clipped."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(clip, -1, 1), SAMPLE_RATE, format="FLAC")
    return data_uri("audio/flac", file.getvalue())


def small_clip_uri(clip: np.ndarray) -> str:
    """A clip at 16 kHz, float32 (samples,), as MP3 at about 23 kbit/s; samples beyond full scale are clipped.

    Every browser plays it, and it is encoded four times as fast as Opus.
    """
    file = io.BytesIO()
    soundfile.write(
        file,
        np.clip(clip, -1, 1),
        SAMPLE_RATE,
        format="MP3",
        subtype="MPEG_LAYER_III",
        compression_level=_MP3_LEVEL,
        bitrate_mode="AVERAGE",
    )
    return data_uri("audio/mpeg", file.getvalue())


def waveform_path(clip: np.ndarray) -> str:
    """An SVG path around a clip's samples, in a box of 300 by 2 whose middle is 0."""
    columns = np.array_split(clip, min(_COLUMNS, max(len(clip), 1)))
    peak = max(float(np.abs(clip).max(initial=0)), 1e-6)
    tops = [float(column.max(initial=0)) / peak for column in columns]
    bottoms = [float(column.min(initial=0)) / peak for column in columns]
    width = _COLUMNS / len(columns)
    there = [f"{number * width:.1f} {-top:.3f}" for number, top in enumerate(tops)]
    back = [f"{number * width:.1f} {-bottom:.3f}" for number, bottom in enumerate(bottoms)][::-1]
    return "M" + " L".join(there + back) + " Z"


def mel_uri(mel: Tensor) -> str:
    """Mel frames (F, B) as an image: time from left to right, low tones at the bottom."""
    values = mel.float().numpy().T[::-1]
    low, high = float(values.min()), float(values.max())
    share = (values - low) / max(high - low, 1e-6)
    places = np.linspace(0, 1, len(_SCALE))
    colours = np.stack([np.interp(share, places, channel) for channel in _SCALE.T], axis=-1)
    file = io.BytesIO()
    Image.fromarray(colours.astype(np.uint8)).save(file, "PNG")
    return data_uri("image/png", file.getvalue())
