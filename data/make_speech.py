"""Makes the sample of speech: short spoken phrases, some recordings of half a minute and more, and noise in what is
held out.

    python data/make_speech.py [--out data/speech]

Everything follows from the seeds below: the same versions of espeak-ng, soxr and libsndfile give the same files. It
takes about a minute on two cores. The folder is described in data/README.md.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from random import Random

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from make_sample import COLORS, NUMBERS, PITCHES, RATE, SPEECH_PROMPT, VOICES, Clip, check_all_different, encoded

THINGS = ("banana", "butterfly", "coffee", "computer", "garden", "hospital", "island", "kitchen", "lemon", "mountain")
SPEEDS = range(120, 221, 5)
"""Words a minute."""
LONG_PHRASES = range(20, 27)
"""Phrases of a long recording: 34 to 49 s."""
NOISE_DB = (0.0, 15.0)
"""Least and greatest signal-to-noise ratio of the noisy recordings, in dB."""
RECORDS = {"train": {"phrase": 600, "long": 12}, "heldout": {"clean": 60, "noisy": 60, "long": 4}}
MAX_BYTES = 6_000_000


@dataclass(frozen=True)
class Recording:
    """A text as it is spoken, and the noise around it."""

    clip: Clip
    noise_db: float | None = None
    seed: int = 0

    def save(self, path: Path) -> None:
        """Writes it as Ogg Opus."""
        wave = self.clip.spoken()
        if self.noise_db is not None:
            noise = hum_and_hiss(len(wave), np.random.default_rng(self.seed))
            level = np.sqrt(np.square(wave).mean() / np.square(noise).mean()) * 10 ** (-self.noise_db / 20)
            wave = wave + level * noise
            wave *= min(1.0, 0.99 / np.abs(wave).max())
        path.write_bytes(encoded(wave.astype(np.float32)))


def hum_and_hiss(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Pink noise that swells and falls, and the hum of a motor: float64 (samples,). `data.augment` makes neither."""
    at = np.arange(samples) / RATE
    spectrum = np.fft.rfft(rng.standard_normal(samples)) / np.sqrt(np.arange(1, samples // 2 + 2))
    hiss = np.fft.irfft(spectrum, samples)
    hiss *= 1 + 0.7 * np.sin(2 * np.pi * (rng.uniform(0.3, 2) * at + rng.uniform()))
    tone = rng.uniform(80, 160)
    hum = sum(np.sin(2 * np.pi * (tone * k * at + rng.uniform())) / k for k in range(1, 8))
    return hiss / hiss.std() + rng.uniform(0, 0.7) * hum / np.std(hum)


def phrase(rng: Random) -> str:
    """A number, a colour and a thing."""
    return f"{rng.choice(NUMBERS)} {rng.choice(list(COLORS))} {rng.choice(THINGS)}"


def plan() -> tuple[dict[str, list[dict]], dict[str, Recording]]:
    """The records of each split, and their recordings by path; nothing is written yet."""
    rng, voices = Random("speech"), cycle(VOICES)
    records: dict[str, list[dict]] = {}
    recordings: dict[str, Recording] = {}
    for split, counts in RECORDS.items():
        records[split] = []
        for kind, count in counts.items():
            for number in range(1, count + 1):
                spoken = [phrase(rng) for _ in range(rng.choice(LONG_PHRASES) if kind == "long" else 1)]
                speed = 120 if kind == "long" else rng.choice(SPEEDS)
                clip = Clip(", ".join(spoken), next(voices), speed, rng.choice(PITCHES))
                noise = rng.uniform(*NOISE_DB) if kind == "noisy" else None
                path = f"audio/{split}/{kind}-{number:03d}.opus"
                recordings[path] = Recording(clip, noise, seed=len(recordings))
                records[split].append(record(kind, path, " ".join(spoken)))
        rng.shuffle(records[split])
    return records, recordings


def record(kind: str, path: str, text: str) -> dict:
    """A line of a file of records."""
    asked = {"role": "user", "content": {"text": SPEECH_PROMPT, "audio": path}}
    return {"type": kind, "conversations": [asked, {"role": "assistant", "content": {"text": text}}]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the sample of speech.")
    parser.add_argument("--out", type=Path, default=Path("data/speech"), help="folder to write to")
    out = parser.parse_args().out
    records, recordings = plan()
    for split, lines in records.items():
        (out / "audio" / split).mkdir(parents=True, exist_ok=True)
        (out / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda path: recordings[path].save(out / path), recordings))
    check_all_different(out / path for path in recordings)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert size < MAX_BYTES, f"the sample takes {size} bytes, more than {MAX_BYTES}"
    print(f"{len(recordings)} recordings, {size / 1e6:.2f} MB in all")


if __name__ == "__main__":
    main()
