"""The shipped sample of speech is what data/README.md says, and what its maker makes."""

import json
import sys
from collections import Counter
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
from transformers import AutoTokenizer

from tests.unit.test_sample_data import DATA, load_script

SPEECH = DATA / "speech"


@pytest.fixture(scope="module")
def make_speech() -> ModuleType:
    return load_script("make_speech")


def read(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SPEECH / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_records_are_what_the_maker_plans(make_speech: ModuleType) -> None:
    records, recordings = make_speech.plan()
    assert {split: Counter(record["type"] for record in read(split)) for split in records} == {
        "train": {"phrase": 600, "long": 12},
        "heldout": {"clean": 60, "noisy": 60, "long": 4},
    }
    for split, made in records.items():
        assert read(split) == made
    assert sorted(recordings) == sorted(
        file.relative_to(SPEECH).as_posix() for file in (SPEECH / "audio").rglob("*.opus")
    )
    assert sum(file.stat().st_size for file in SPEECH.rglob("*") if file.is_file()) < 4_000_000


def test_long_recordings_are_over_half_a_minute(make_speech: ModuleType) -> None:
    """And fit into the 2,048 tokens of data=speech, at 25 a second."""
    for path in make_speech.plan()[1]:
        info = soundfile.info(SPEECH / path)
        assert info.samplerate in (16_000, 48_000)
        seconds = info.frames / info.samplerate
        assert 30 < seconds < 60 if "long" in path else 0.6 < seconds < 2


def test_noise_has_its_ratio(make_speech: ModuleType) -> None:
    """Of the maker's noise alone, by the powers of speech and noise: white noise has the same in both halves."""
    noise = make_speech.hum_and_hiss(32_000, np.random.default_rng(0))
    assert noise.shape == (32_000,)
    spectrum = np.abs(np.fft.rfft(noise)) ** 2
    assert spectrum[: len(spectrum) // 8].sum() > 0.8 * spectrum.sum()


def test_words_are_single_tokens(make_speech: ModuleType) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny")
    for record in read("train")[:100]:
        text = record["conversations"][-1]["content"]["text"]
        assert len(tokenizer.tokenize(text)) == len(text.split())


def test_nothing_of_training_is_held_out() -> None:
    sys.modules.pop("make_speech", None)
    sounds = [soundfile.read(file, dtype="int16")[0].tobytes() for file in sorted((SPEECH / "audio").rglob("*.opus"))]
    assert len(set(sounds)) == len(sounds) == 736
