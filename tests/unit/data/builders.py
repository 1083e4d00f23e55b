"""A tiny byte-level tokenizer with Megrez's special tokens, and records and media made on the spot."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from train.families.megrezo.template import CHAT_TEMPLATE_JINJA
from train.schema import Part, Record, Turn

SPECIAL = [
    "<|eos|>", "<|unk|>", "<|pad|>", "<|role_start|>", "<|role_end|>", "<|turn_end|>",
    "<|image_start|>", "<|image_end|>", "<|image_pad|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>",
    "<|function_start|>", "<|function_end|>", "<|slice_start|>", "<|slice_end|>",
    "<|image_id_start|>", "<|image_id_end|>",
]  # fmt: skip
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ċ", "Ċ")]


def make_tokenizer(without: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """256 bytes, a few merges, then the special tokens."""
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = [name for name in SPECIAL if name not in without]
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    named = {"eos_token": "<|turn_end|>", "pad_token": "<|pad|>", "unk_token": "<|unk|>"}
    named = {key: name for key, name in named.items() if name not in without}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE_JINJA, **named)


def png(width: int, height: int, color="red", mode: str = "RGB") -> bytes:
    """An encoded image of one colour."""
    file = io.BytesIO()
    Image.new(mode, (width, height), color).save(file, "PNG")
    return file.getvalue()


def tone(seconds: float, rate: int = 16_000, channels: int = 1, hertz: float = 440.0) -> np.ndarray:
    """A sine, float32 (samples, channels)."""
    wave = 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def wav(seconds: float, rate: int = 16_000, channels: int = 1) -> bytes:
    """An encoded tone."""
    file = io.BytesIO()
    soundfile.write(file, tone(seconds, rate, channels), rate, format="WAV")
    return file.getvalue()


def by_av(samples: np.ndarray, rate: int, form: str, codec: str) -> bytes:
    """What PyAV encodes; samples are float32 (samples, channels)."""
    av = pytest.importorskip("av")
    channels = samples.shape[1]
    layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}.get(channels, f"{channels} channels")
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        for begin in range(0, len(samples), 1024):
            piece = np.ascontiguousarray(samples[begin : begin + 1024]).reshape(1, -1)
            is_float = channels <= 16  # more are not resampled: they must come as they are stored
            piece = piece if is_float else (piece * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(piece, format="flt" if is_float else "s16", layout=layout)
            frame.sample_rate, frame.pts = rate, begin
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims this size, whatever it takes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


class PeakMemory:
    """How much this process grows inside the block at most: `mib`."""

    def __enter__(self) -> "PeakMemory":
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.mib = (_status("VmHWM") - self._before) / 1024


def _status(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def talk(*turns) -> Record:
    """A record of (role, content[, weight]); content is a text or (kind, content) pairs."""
    made = []
    for role, content, *weight in turns:
        parts = [("text", content)] if isinstance(content, str) else content
        made.append(Turn(role, tuple(Part(*part) for part in parts), *weight))
    return Record(tuple(made), "a.jsonl", 3)
