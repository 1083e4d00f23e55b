"""Recordings: their length from the header, their samples at 16 kHz, and log-mel frames.

Soundfile decodes and soxr resamples everywhere, so that features do not differ between machines; PyAV reads
what soundfile cannot, such as M4A.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from io import FileIO
from math import ceil, gcd
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from train.data.media import head_of, header_of, medium_name, reading, remembered
from train.errors import BadRecord
from train.schema import MediaFile, MediaSource, Span, Window, file_of

SAMPLE_RATE = 16_000
"""Samples a second of every clip that is handed on."""

MAX_RATE = 384_000
"""Highest sampling rate that is decoded, in Hz."""

MAX_PEAK = 2.0**31
"""Loudest sample that is taken, full scale being 1: float files in the scale of integers pass, garbage does not."""

MAX_SECONDS = 1e7
"""Longest recording that a header may state: 116 days. Formats that know no length state much more."""

CLIP_TOLERANCE = (0.1, 0.01)
"""How far a clip may differ from its header: seconds, and a share of its length."""

_BLOCK = 2**20
"""Values that libsndfile decodes at a time, all channels together; samples of a channel that FFmpeg does."""

_PACKET = 2**26
"""Largest packet in bytes that FFmpeg decodes: a few seconds of many channels fit."""

_RUN_UP_S = 0.5
"""Seconds before a span from which it is decoded: some decoders need a few packets before their sound is right."""

_CHANNELS = 64
"""Most channels that FFmpeg converts."""

_PAGES = 20_000
"""Pages of an Ogg file that are looked at: more than 30 s of sound."""

# Named one by one, because libsndfile guesses at headerless formats, and some of FFmpeg's other formats are
# lists of further files and addresses.
_SNDFILE_HEADS = re.compile(rb"RIFF|RIFX|RF64|FORM|caff|\.snd|NIST|fLaC|OggS|ID3|\xff[\xe0-\xff]")
_MPEG_HEADS = re.compile(rb"ID3|\xff|RI")  # a WAV may hold an MP3
_AV_BOUNDS = {"max_samples": str(_BLOCK)}
_AV_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,aac,matroska,webm,asf,amr,mp3,wav,ogg,flac"


def clip_samples(seconds: float) -> int:
    """Samples at 16 kHz of a recording of that duration, rounded up."""
    return ceil(round(seconds * SAMPLE_RATE, 3))


def speed_ratio(speed: float) -> tuple[int, int]:
    """From which to which sampling rate a clip is resampled to run at that speed, in lowest terms.

    >>> speed_ratio(0.9)
    (9, 10)
    """
    rate = round(speed * SAMPLE_RATE)
    shared = gcd(rate, SAMPLE_RATE)
    return rate // shared, SAMPLE_RATE // shared


def samples_at(speed: float, samples: int) -> int:
    """Samples that a clip of so many has at that speed.

    >>> samples_at(0.9, 16_000)
    17778
    """
    rate, own = speed_ratio(speed)
    return -(-samples * own // rate)


@dataclass(frozen=True, slots=True)
class ClipHeader:
    """What a recording's header says; of a span, with the span's length."""

    seconds: float | None
    rate: int
    """samples a second"""
    channels: int


def clip_length(source: MediaSource) -> int:
    """Samples at 16 kHz of a recording, from its header; BadRecord if it cannot be read."""
    if isinstance(source, Window):
        return source.end - source.begin
    seconds = clip_header(source).seconds
    if seconds is None or not 0 <= seconds < MAX_SECONDS:
        raise BadRecord(
            f"{medium_name('audio', file_of(source))}: its header states no length; convert it to WAV, or to FLAC in a "
            "file"
        )
    return clip_samples(seconds)


def clip_header(source: MediaSource) -> ClipHeader:
    """What a recording's header says; BadRecord if it cannot be read, or a span does not lie in it."""
    source = source.source if isinstance(source, Window) else source
    header = _header(file_of(source))
    if not isinstance(source, Span) or header.seconds is None:
        return header
    try:
        begin, end = _stretch(source, header.seconds, header.rate)
    except BadRecord as fault:
        raise BadRecord(f"{medium_name('audio', source.file)}: {fault}") from None
    return replace(header, seconds=(end - begin) / header.rate)


def load_clip(source: MediaSource, max_samples: int | None = None) -> np.ndarray:
    """The recording, mono at 16 kHz: float32 (samples,). Of a span, nothing that lies after it is decoded.

    Args:
        max_samples: decode no more than about this many samples (at 16 kHz); None decodes everything.

    Raises:
        BadRecord: if it cannot be decoded.
    """
    if isinstance(source, Window):
        return load_clip(source.source)[source.begin : source.end] if source.clip is None else source.clip
    with _reading(source) as file:
        try:
            with _opened_by_sndfile(file) as sound:
                rate = sound.samplerate
                begin, frames = _to_decode(source, sound.frames / rate, rate, max_samples)
                run_up = min(begin, int(_RUN_UP_S * rate))
                if begin:
                    sound.seek(begin - run_up)
                decoded = _decode_by_sndfile(sound, frames + run_up if frames >= 0 else frames)[run_up:]
        except soundfile.LibsndfileError:
            decoded, rate = _decode_by_av(file, source, max_samples)
        return resampled(decoded, rate)


def load_fitted(source: MediaSource, samples: int, *, is_cut: bool = False) -> np.ndarray:
    """The recording trimmed or padded to the samples that its header told; BadRecord where it differs by more.

    is_cut: whether `samples` is where the recording is cut, so that any number may follow.
    """
    decoded = load_clip(source, samples)
    seconds, share = CLIP_TOLERANCE
    try:
        return fit_clip(decoded[:samples] if is_cut else decoded, samples, seconds + share * samples / SAMPLE_RATE)
    except BadRecord as fault:
        raise BadRecord(f"{name_of(source)}: {fault}") from None


def name_of(source: MediaSource) -> str:
    """What a message calls a recording."""
    file = file_of(source)
    return f"'{file}'" if isinstance(file, str) else "(embedded)"


def resampled(decoded: np.ndarray, rate: int) -> np.ndarray:
    """Mono samples at any rate as a clip at 16 kHz: float32 (samples,); BadRecord if they are no sound."""
    clip = decoded if rate == SAMPLE_RATE else _by_soxr(decoded, rate)
    peak = np.abs(clip).max(initial=0)
    if not peak <= MAX_PEAK:  # neither is NaN
        raise BadRecord(f"it holds samples that are not numbers or no sound (up to {peak:g}); replace it")
    return clip


def fit_clip(clip: np.ndarray, samples: int, tolerance: float) -> np.ndarray:
    """The clip trimmed or padded with zeros to `samples`; BadRecord if `tolerance` seconds do not suffice."""
    excess = len(clip) - samples
    if abs(excess) > tolerance * SAMPLE_RATE:
        raise BadRecord(
            f"audio of {len(clip) / SAMPLE_RATE:.2f} s whose header says {samples / SAMPLE_RATE:.2f} s; "
            "convert it to WAV or FLAC"
        )
    return clip[:samples] if excess >= 0 else np.pad(clip, (0, -excess))


def log_mel(clip: np.ndarray, feature_extractor: WhisperFeatureExtractor, frames: int) -> Tensor:
    """Whisper's first log-mel frames of a clip: float32 (frames, mel bins), a hop each.

    They are those of the clip padded to the extractor's longest, but without computing the silence.

    Args:
        clip: float32 (samples,), mono at 16 kHz, at most `feature_extractor.n_samples` of them.
    """
    # A frame reaches 200 samples to both sides, and the edge is mirrored: five hops of zeros leave every
    # frame that touches the clip, and so the maximum over all frames, as they are before 30 s of zeros.
    hop = feature_extractor.hop_length
    padded = np.zeros(min((len(clip) // hop + 6) * hop, feature_extractor.n_samples), np.float32)
    padded[: len(clip)] = clip
    features = feature_extractor(padded, sampling_rate=SAMPLE_RATE, padding="do_not_pad", return_tensors="np")
    return torch.from_numpy(features["input_features"][0, :, :frames].T.copy())


@remembered
def _header(source: MediaFile) -> ClipHeader:
    """The header of a whole recording."""
    with _reading(source) as file, header_of(file) as opened:
        try:
            with _opened_by_sndfile(opened) as sound:
                return ClipHeader(sound.frames / sound.samplerate, sound.samplerate, sound.channels)
        except soundfile.LibsndfileError:
            with _opened_by_av(opened) as (container, stream):
                return ClipHeader(_seconds(container, stream), stream.rate, stream.codec_context.channels)


def _seconds(container: Any, stream: Any) -> float | None:
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / 1e6


def _by_soxr(clip: np.ndarray, rate: int) -> np.ndarray:
    try:
        import soxr
    except ImportError:  # a model folder that carries this code loads without it
        raise BadRecord(
            f"it has {rate} samples a second, and soxr, which would resample it, is not installed; "
            f"`pip install soxr`, or convert it to {SAMPLE_RATE} a second"
        ) from None
    return soxr.resample(clip, rate, SAMPLE_RATE)


def _stretch(span: Span, seconds: float, rate: int) -> tuple[int, int]:
    """The first frame of a span and the one after its last; BadRecord where the recording is over before."""
    end_s = seconds if span.end_s is None else span.end_s
    tolerance, _ = CLIP_TOLERANCE
    if end_s > seconds + tolerance or span.start_s >= seconds:
        raise BadRecord(
            f"its span goes from {span.start_s:g} to {end_s:g} s, and it has {seconds:.2f} s; correct start_s and end_s"
        )
    return round(span.start_s * rate), round(min(end_s, seconds) * rate)


def _to_decode(source: MediaSource, seconds: float | None, rate: int, max_samples: int | None) -> tuple[int, int]:
    """The first frame to decode, and how many, with a margin for the resampler; -1 = all."""
    most = -1 if max_samples is None else int((max_samples / SAMPLE_RATE + 0.5) * rate)
    if not isinstance(source, Span) or seconds is None:
        return 0, most
    begin, end = _stretch(source, seconds, rate)
    return begin, end - begin if most < 0 else min(end - begin, most)


@contextmanager
def _reading(source: MediaSource) -> Iterator[Any]:
    with reading("audio", file_of(source), "replace it by a valid WAV or FLAC", buffering=0) as file:
        if head_of(file, 4) == b"OggS":
            _check_one_link(file)
        yield file


def _check_one_link(file: Any) -> None:
    """BadRecord if an Ogg file is several, end to end: libsndfile reads the first and says nothing of the others."""
    is_begun = False
    for _ in range(_PAGES):
        page = file.read(27)
        if len(page) < 27 or page[:4] != b"OggS":
            break
        is_first = bool(page[5] & 2)  # of its stream; streams that run side by side all begin before the rest
        if is_first and is_begun:
            raise BadRecord("it is several Ogg files end to end, and only the first would be heard; encode it anew")
        is_begun = not is_first
        file.seek(sum(file.read(page[26])), os.SEEK_CUR)
    file.seek(0)


_STDERR = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what libmpg123 writes to stderr about a damaged MP3: up to fifty times its size."""
    with _STDERR:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


@contextmanager
def _opened_by_sndfile(file: Any) -> Iterator[soundfile.SoundFile]:
    """The open sound; LibsndfileError if it is in none of the formats that libsndfile is asked to read."""
    head = head_of(file)
    if not _SNDFILE_HEADS.match(head):
        raise soundfile.LibsndfileError(1)
    # By its descriptor, libsndfile reads a file itself, without a detour through Python.
    opened = file.fileno() if isinstance(file, FileIO) else file
    with (
        _quiet() if _MPEG_HEADS.match(head) else nullcontext(),
        soundfile.SoundFile(opened, "r", closefd=False) as sound,
    ):
        if sound.samplerate > MAX_RATE:
            raise BadRecord(f"it has {sound.samplerate} samples a second, more than {MAX_RATE}; resample it")
        yield sound


def _decode_by_sndfile(sound: soundfile.SoundFile, frames: int) -> np.ndarray:
    """Mono samples, float32; in blocks, since a file may claim a thousand channels."""
    blocks = sound.blocks(max(_BLOCK // sound.channels, 1), frames=frames, dtype="float32", always_2d=True)
    with np.errstate(over="ignore", invalid="ignore"):  # samples that are no numbers are found afterwards
        pieces = [block.mean(axis=1) for block in blocks]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise BadRecord(
            "soundfile does not know its format, and PyAV, which may, is not installed (`pip install av`)"
        ) from None
    return av


@contextmanager
def _opened_by_av(file: Any) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and its first audio stream."""
    av = _av()
    head = head_of(file)
    try:
        with av.open(file, options={"format_whitelist": _AV_FORMATS} | _AV_BOUNDS) as container:
            if not container.streams.audio:
                raise BadRecord("it has no sound; replace it")
            stream = container.streams.audio[0]
            if stream.rate > MAX_RATE:
                raise BadRecord(f"it has {stream.rate} samples a second, more than {MAX_RATE}; resample it")
            if stream.codec_context.channels > _CHANNELS:
                raise BadRecord(f"it has {stream.codec_context.channels} channels; convert it to WAV or FLAC")
            stream.codec_context.options = _AV_BOUNDS
            yield container, stream
    except av.FFmpegError as error:
        raise BadRecord(
            f"it begins with {head!r} and is no recording that can be read ({error.strerror}); "
            "replace it by a valid WAV or FLAC"
        ) from None


def _decode_by_av(file: Any, source: MediaSource, max_samples: int | None) -> tuple[np.ndarray, int]:
    """Mono samples, float32, and their rate."""
    with _opened_by_av(file) as (container, stream):
        # Not planes: PyAV reads those from the eighth on out of memory that is not theirs.
        to_packed = _av().AudioResampler(format="flt")
        rate = stream.rate
        begin, limit = _to_decode(source, _seconds(container, stream), rate, max_samples)
        if begin:
            container.seek(max(int((begin / rate - _RUN_UP_S) / stream.time_base), 0), stream=stream)
        pieces, total, to_drop = [], 0, None
        for packet in container.demux(stream):
            if packet.size > _PACKET:
                raise BadRecord(f"a packet of it has {packet.size} bytes, more than {_PACKET}; convert it to WAV")
            for frame in packet.decode():
                if to_drop is None:
                    to_drop = max(begin - round((frame.time or 0) * rate), 0) if begin else 0
                for packed in to_packed.resample(frame):
                    piece = packed.to_ndarray().reshape(packed.samples, -1)[to_drop:].mean(axis=1)
                    to_drop -= packed.samples - len(piece)
                    pieces.append(piece)
                    total += len(piece)
            if 0 <= limit <= total:
                break
    decoded = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    return (decoded if limit < 0 else decoded[:limit]), rate
