"""Recordings over 30 s, split: the same tokens and features as their windows given as clips of their own."""

import io
import random
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from tests.unit.data.builders import png, talk
from train.data.audio import load_clip
from train.data.windows import window_cuts
from train.errors import BadRecord
from train.schema import Record, Span

RATE = 16_000


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Bursts of noise with pauses between them."""
    rng = np.random.default_rng(seed)
    clip = rng.uniform(-0.4, 0.4, round(seconds * RATE)).astype(np.float32)
    for place in rng.uniform(0, seconds, round(seconds)):
        clip[round(place * RATE) : round((place + 0.25) * RATE)] *= 0.01
    return clip


def encoded(clip: np.ndarray, rate: int = RATE, form: str = "WAV", subtype: str = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, clip, rate, format=form, subtype=subtype)
    return file.getvalue()


@pytest.fixture
def split(processor: Any) -> Any:
    processor.long_audio = "split"
    return processor


def asked(*clips: bytes | Span, answer: str = "hello") -> Record:
    return talk(("user", [*[("audio", clip) for clip in clips], ("text", "?")]), ("assistant", answer))


@pytest.mark.parametrize(("form", "subtype", "rate"), [("WAV", "FLOAT", 16_000), ("FLAC", "PCM_16", 22_050)])
def test_windows_are_clips_of_their_own_to_the_bit(split: Any, form: str, subtype: str, rate: int) -> None:
    """95 s, and a short clip after it, which counts on from the windows."""
    long, short = encoded(speech(95 * rate / RATE), rate, form, subtype), encoded(speech(1.5, 1))
    clip = load_clip(long)
    cuts = window_cuts(len(clip), 30 * RATE, 640, clip)
    assert len(cuts) == 5
    windows = [encoded(clip[begin:end]) for begin, end in pairwise(cuts)]
    found, expected = split.encode(asked(long, short)), split.encode(asked(*windows, short))
    torch.testing.assert_close(asdict(found), asdict(expected), rtol=0, atol=0)
    spelled = "".join(split.tokenizer.convert_ids_to_tokens(found.input_ids.tolist()))
    for number in range(1, 6):
        assert f"AudioĠ{number}:Ġ<|audio_start|>" in spelled


@pytest.mark.parametrize("seed", range(4))
def test_lengths_are_known_before_decoding(split: Any, seed: int) -> None:
    """Of headers alone: the same tokens, frames and cut text as after decoding, whatever is cut."""
    rng = random.Random(seed)
    clips = [encoded(speech(rng.uniform(25, 70), rng.randrange(99)), rng.choice([8_000, 16_000])) for _ in range(2)]
    turns = [("user", [("image", png(100, 100)), ("audio", clips[0])]), ("assistant", "hello " * 9)]
    record = talk(*turns, ("user", [("text", "and?"), ("audio", clips[1])]), ("assistant", "b"))
    whole = split.measure(record)
    for limit in (None, *(rng.randrange(40, whole.tokens) for _ in range(6))):
        options: dict[str, Any] = {"max_tokens": limit, "too_long": "cut_text"}
        try:
            sample = split.encode(record, **options)
        except BadRecord:
            with pytest.raises(BadRecord, match="hold nothing that is learned"):
                split.measure(record, **options)
            continue
        lengths, outline = split.measure(record, **options), split.outline(record, **options)
        assert lengths.tokens == len(sample.input_ids) == len(outline.input_ids)
        assert outline.input_ids == sample.input_ids.tolist()
        for kind, media in sample.media.items():
            assert lengths.units[kind] == len(media.values)
            assert [place for of in outline.media if of.kind == kind for place in of.places] == media.places.tolist()


@pytest.mark.parametrize(("pool", "places"), [(1, 47.5), (2, 23.75), (5, 9.5)])
def test_places_do_not_depend_on_the_cuts(tokenizer: Any, pool: int, places: float) -> None:
    """95 s are 4,750 frames of the encoder, in 4 windows with begin and end: pooled, and 8 more."""
    from transformers import WhisperFeatureExtractor

    from train.families.megrezo.processor import MegrezOImageProcessor, MegrezOProcessor

    split = MegrezOProcessor(
        MegrezOImageProcessor(), WhisperFeatureExtractor(128), tokenizer, long_audio="split", audio_pool=pool
    )
    sample = split.encode(asked(encoded(speech(95))))
    assert len(sample.media["audio"].places) == 100 * places + 8
    assert split.measure(asked(encoded(speech(95)))).units == {"audio": 9500}


def test_more_than_the_context_holds_is_refused(split: Any) -> None:
    record = asked(encoded(np.zeros(190 * RATE, np.float32), subtype="PCM_16"))
    for act in (split.measure, split.encode):
        told = r"^a\.jsonl:3: it has 48\d\d tokens, more than 4096 \(4766 of them are 190\.0 s of audio in 8 windows\)"
        with pytest.raises(BadRecord, match=told):
            act(record, max_tokens=4096)
    assert split.measure(asked(encoded(np.zeros(155 * RATE, np.float32))), max_tokens=4096).tokens <= 4096


def test_a_header_of_hours_is_refused_at_once(split: Any, tmp_path: Path) -> None:
    file = tmp_path / "hours.wav"
    file.write_bytes(encoded(np.zeros(8, np.float32), subtype="PCM_16"))
    data = bytearray(file.read_bytes())
    data[40:44] = (2**31).to_bytes(4, "little")  # the length of the data, and a file that has it, sparsely
    data[4:8] = (2**31 + 36).to_bytes(4, "little")
    with file.open("wb") as out:
        out.write(data)
        out.truncate(2**30 - 1)
    with pytest.raises(BadRecord, match="is longer than 3600 s; split it"):
        split.measure(asked(str(file)))


def test_a_span_is_split_too(split: Any) -> None:
    long = encoded(speech(120))
    span = split.encode(asked(Span(long, 20.0, 75.0)))
    alone = split.encode(asked(encoded(load_clip(long)[20 * RATE : 75 * RATE])))
    torch.testing.assert_close(asdict(span), asdict(alone), rtol=0, atol=0)
    assert len(span.media["audio"].sizes) == 2
