"""Makes the sample data: pictures of one coloured shape, spoken words and questions, and records about them.

    python data/make_sample.py [--out data/sample]

Everything follows from the seeds below: the same versions of espeak-ng, soxr and libsndfile give the same
files. It takes about a minute on two cores. The folder and its format are described in data/README.md.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from math import cos, pi, sin
from pathlib import Path
from random import Random
from zlib import crc32

import numpy as np
import soundfile
import soxr
from PIL import Image, ImageDraw

SIDE = 112
"""Pixels of a picture's side."""
RATE = 16_000
"""Samples a second of a recording."""
MAX_BYTES = 8_000_000

COLORS = {
    "red": (215, 30, 35),
    "green": (35, 160, 60),
    "blue": (35, 70, 215),
    "yellow": (240, 220, 45),
    "purple": (140, 45, 165),
    "orange": (240, 140, 25),
}
"""Of objects, as RGB."""
BACKGROUNDS = {
    "black": (20, 20, 20),
    "white": (235, 235, 235),
    "gray": (128, 128, 128),
    "brown": (110, 65, 35),
}
"""Of backgrounds, as RGB."""
SIZES = {"small": (12.0, 15.0), "large": (42.0, 48.0)}
"""Least and greatest radius, in pixels."""
OFF_CENTRE = 6.0
"""How far a shape's middle may lie from the picture's, in pixels, either way."""
SHAPES = {"circle": (1.0,) * 40, "square": (1.0,) * 4, "triangle": (1.0,) * 3, "star": (1.0, 0.5) * 5}
"""Corners by their distance from the centre, at equal angles."""

QUESTIONS = {
    "What color is the object?": ("color", tuple(COLORS)),
    "What color is the background?": ("background", tuple(BACKGROUNDS)),
    "Is the object small or large?": ("size", tuple(SIZES)),
}
"""The question, the attribute of a picture that answers it, and all answers."""
SPEECH_PROMPT = "Convert speech to text."
PICTURE_PROMPTS = (
    "What color is the object in the first picture?",
    "What color is the object in the second picture?",
)
WORDS = (
    *("banana", "butterfly", "chocolate", "coffee", "computer", "elephant", "football", "garden"),
    *("hospital", "island", "kitchen", "lemon", "mountain", "music", "orange", "piano"),
    *("purple", "river", "seven", "tomato", "umbrella", "window", "yellow", "zero"),
)

VOICES = ("en-us", "en-us+m3", "en-us+f2", "en-us+f4", "en+m1", "en+m7", "en+f1", "en+f3")
"""American and British; espeak-ng 1.51 ignores a variant after en-gb."""
WORD_SPEEDS, QUESTION_SPEEDS = range(120, 160, 3), range(175, 215, 3)
"""Words a minute; at neighbouring speeds espeak-ng may speak exactly alike."""
PITCHES = range(30, 71)
"""On espeak-ng's scale of 0 to 99."""

PAIRS = (
    ("hot", "cold"),
    ("up", "down"),
    ("day", "night"),
    ("fast", "slow"),
    ("left", "right"),
    ("new", "old"),
)
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
REPEATED = WORDS[:12]
PHRASINGS = {
    "opposite": (
        "What is the opposite of {}?",
        "Which word is the opposite of {}?",
        "Tell me the opposite of {}.",
        "Name the opposite of {}.",
        "The opposite of {} is what?",
    ),
    "after": (
        "What number comes after {}?",
        "Which number follows {}?",
        "Tell me the number after {}.",
        "Name the number after {}.",
        "What is {} plus one?",
    ),
    "repeat": (
        "Repeat the word {}.",
        "Say the word {}.",
        "Write the word {}.",
        "Please repeat {}.",
        "Tell me the word {} again.",
    ),
}


@dataclass(frozen=True)
class Picture:
    """One shape on a plain ground."""

    color: str
    background: str
    size: str
    palette: tuple[int, ...]
    """RGB of the ground, then of the object."""
    corners: tuple[tuple[float, float], ...]

    def save(self, path: Path) -> None:
        image = Image.new("P", (SIDE, SIDE), 0)
        image.putpalette(self.palette)
        ImageDraw.Draw(image).polygon(self.corners, fill=1)
        image.save(path, optimize=True)


@dataclass(frozen=True)
class Clip:
    """A text, and how it is spoken."""

    text: str
    voice: str
    speed: int
    pitch: int

    def spoken(self) -> np.ndarray:
        """The text as it is spoken, the silence at both ends trimmed: float32 (samples,) at 16 kHz."""
        command = ["espeak-ng", "-v", self.voice, "-s", str(self.speed), "-p", str(self.pitch)]
        spoken = subprocess.run([*command, "--stdout", self.text], capture_output=True, check=True).stdout
        wave, rate = soundfile.read(io.BytesIO(spoken), dtype="float32")
        loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
        return soxr.resample(wave[loud[0] : loud[-1] + 1], rate, RATE)

    def save(self, path: Path) -> None:
        """Writes what is spoken as `encoded`."""
        path.write_bytes(encoded(self.spoken()))


def encoded(wave: np.ndarray) -> bytes:
    """Samples at 16 kHz as mono Ogg Opus of about 18 kbit/s, equal samples as equal bytes."""
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="OGG", subtype="OPUS", compression_level=0.95)
    return normal_ogg(file.getvalue())


_BITS_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_PLAIN_TAGS = b"OpusTags" + (4).to_bytes(4, "little") + b"opus" + bytes(4)


def normal_ogg(ogg: bytes) -> bytes:
    """The same Ogg Opus file with stream number 1 and plain tags.

    libsndfile draws the number at random, so no two files would be equal, and pads the tags by 500 bytes, a
    quarter of a spoken word. Pages are laid out as in RFC 3533: number at 14, checksum at 22 (CRC-32, most
    significant bit first, from 0; here by zlib's mirrored CRC), lengths of the segments from 26. The tags of
    RFC 7845 are the second page.
    """
    pages: list[bytes] = []
    start = 0
    while start < len(ogg):
        segments = ogg[start + 26]
        end = start + 27 + segments + sum(ogg[start + 27 : start + 27 + segments])
        page = bytearray(ogg[start:end])
        if len(pages) == 1:
            page[26:] = bytes([1, len(_PLAIN_TAGS)]) + _PLAIN_TAGS
        page[14:18] = (1).to_bytes(4, "little")
        page[22:26] = bytes(4)
        mirrored = crc32(page.translate(_BITS_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        page[22:26] = int(f"{mirrored:032b}"[::-1], 2).to_bytes(4, "little")
        pages.append(bytes(page))
        start = end
    return b"".join(pages)


@dataclass
class Booth:
    """Deals out ways of speaking: voices in turn for each text, no (text, voice, speed, pitch) twice."""

    rng: Random
    used: dict[str, set[Clip]] = field(default_factory=dict)

    def speak(self, text: str) -> Clip:
        used = self.used.setdefault(text, set())
        voice = VOICES[len(used) % len(VOICES)]
        speeds = WORD_SPEEDS if text in WORDS else QUESTION_SPEEDS
        while True:
            clip = Clip(text, voice, self.rng.choice(speeds), self.rng.choice(PITCHES))
            if clip not in used:
                used.add(clip)
                return clip


@dataclass
class Split:
    """The records of training or of the held-out part, and their media by path."""

    name: str
    booth: Booth
    texts: list[tuple[str, str]]
    """Questions and answers of the type "text"."""
    rng: Random = field(init=False)
    records: list[dict] = field(default_factory=list)
    pictures: dict[str, Picture] = field(default_factory=dict)
    clips: dict[str, Clip] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = Random(self.name)

    def draw(self, attribute: str, value: str) -> Picture:
        """A random picture whose `attribute` is `value`."""
        while True:
            color, background = self.rng.choice(list(COLORS)), self.rng.choice(list(BACKGROUNDS))
            size = self.rng.choice(list(SIZES))
            if value == {"color": color, "background": background, "size": size}[attribute]:
                break
        shade = [channel + self.rng.randint(-12, 12) for channel in BACKGROUNDS[background] + COLORS[color]]
        radius, angle = self.rng.uniform(*SIZES[size]), self.rng.uniform(0, 2 * pi)
        x, y = (SIDE / 2 + self.rng.uniform(-OFF_CENTRE, OFF_CENTRE) for _ in "xy")
        distances = SHAPES[self.rng.choice(list(SHAPES))]
        turn = 2 * pi / len(distances)
        corners = [
            (x + radius * d * cos(angle + i * turn), y + radius * d * sin(angle + i * turn))
            for i, d in enumerate(distances)
        ]
        return Picture(color, background, size, tuple(shade), tuple(corners))

    def add_picture(self, picture: Picture) -> str:
        path = f"images/{self.name}/{len(self.pictures) + 1:04d}.png"
        self.pictures[path] = picture
        return path

    def add_clip(self, text: str) -> str:
        path = f"audio/{self.name}/{len(self.clips) + 1:04d}.opus"
        self.clips[path] = self.booth.speak(text)
        return path


def user(**content: str | list[str]) -> dict:
    return {"role": "user", "content": content}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": {"text": text}}


def ask(split: Split, index: int) -> tuple[str, Picture, str]:
    """A question, a picture and the answer; indices in turn take every question and answer equally often."""
    question = list(QUESTIONS)[index % len(QUESTIONS)]
    attribute, answers = QUESTIONS[question]
    answer = answers[index // len(QUESTIONS) % len(answers)]
    return question, split.draw(attribute, answer), answer


def speech(split: Split, index: int) -> list[dict]:
    word = WORDS[index % len(WORDS)]
    return [user(text=SPEECH_PROMPT, audio=split.add_clip(word)), assistant(word)]


def typed_picture(split: Split, index: int) -> list[dict]:
    question, picture, answer = ask(split, index)
    return [user(text=question, image=split.add_picture(picture)), assistant(answer)]


def spoken_picture(split: Split, index: int) -> list[dict]:
    question, picture, answer = ask(split, index)
    return [user(image=split.add_picture(picture), audio=split.add_clip(question)), assistant(answer)]


def turns(split: Split, index: int) -> list[dict]:
    """All three questions about one picture; the second is spoken in half of the records."""
    first, picture, answer = ask(split, index)
    others = [question for question in QUESTIONS if question != first]
    split.rng.shuffle(others)
    conversation = [user(text=first, image=split.add_picture(picture)), assistant(answer)]
    for place, question in enumerate(others):
        spoken = place == 0 and split.rng.random() < 0.5
        conversation.append(user(audio=split.add_clip(question)) if spoken else user(text=question))
        conversation.append(assistant(getattr(picture, QUESTIONS[question][0])))
    return conversation


def pictures(split: Split, index: int) -> list[dict]:
    """Two pictures whose objects differ in colour; the question is about one of them."""
    asked = index % 2
    answer = list(COLORS)[index // 2 % len(COLORS)]
    other = split.rng.choice([color for color in COLORS if color != answer])
    colors = (answer, other) if asked == 0 else (other, answer)
    paths = [split.add_picture(split.draw("color", color)) for color in colors]
    return [user(text=PICTURE_PROMPTS[asked], image=paths), assistant(answer)]


def fact(split: Split, index: int) -> list[dict]:
    question, answer = split.texts[index]
    return [user(text=question), assistant(answer)]


TYPES: dict[str, tuple[int, Callable[[Split, int], list[dict]]]] = {
    "speech": (600, speech),
    "typed_picture": (750, typed_picture),
    "spoken_picture": (750, spoken_picture),
    "turns": (600, turns),
    "pictures": (150, pictures),
    "text": (150, fact),
}
"""Records for training, and what makes one. A tenth as many more are held out."""


def text_facts(rng: Random) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """33 facts in five phrasings each, for training and held out.

    15 facts have one phrasing held out, so training teaches the fact and, by other facts, the phrasing.
    """
    facts = [("opposite", a, b) for pair in PAIRS for a, b in (pair, pair[::-1])]
    facts += [("after", number, following) for number, following in pairwise(NUMBERS)]
    facts += [("repeat", word, word) for word in REPEATED]
    rng.shuffle(facts)
    train, heldout = [], []
    for place, (kind, word, answer) in enumerate(facts):
        asked = [(phrasing.format(word), answer) for phrasing in PHRASINGS[kind]]
        if place < 15:
            heldout.append(asked.pop(rng.randrange(len(asked))))
        train += asked
    rng.shuffle(train)
    return train, heldout


def plan() -> list[Split]:
    """The training and the held-out split: records and what their media show and say, nothing written yet."""
    booth = Booth(Random("booth"))
    train_texts, heldout_texts = text_facts(Random("text"))
    splits = [Split("train", booth, train_texts), Split("heldout", booth, heldout_texts)]
    for split in splits:
        for kind, (count, make) in TYPES.items():
            for index in range(count if split.name == "train" else count // 10):
                split.records.append({"type": kind, "conversations": make(split, index)})
        split.rng.shuffle(split.records)
    return splits


def content_hashes(path: Path) -> tuple[bytes, bytes]:
    """Hashes of the file and of what it decodes to."""
    if path.suffix == ".png":
        decoded = Image.open(path).convert("RGB").tobytes()
    else:
        decoded = soundfile.read(path, dtype="int16")[0].tobytes()
    return hashlib.sha256(path.read_bytes()).digest(), hashlib.sha256(decoded).digest()


def check_all_different(paths: Iterable[Path]) -> None:
    """Asserts that no two media are equal, as files or decoded; so none of training is held out."""
    files, contents = zip(*map(content_hashes, paths), strict=True)
    assert len(set(files)) == len(set(contents)) == len(files), "two media of the sample are equal"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the sample data.")
    parser.add_argument("--out", type=Path, default=Path("data/sample"), help="folder to write to")
    out = parser.parse_args().out
    splits = plan()
    media: dict[str, Picture | Clip] = {}
    for split in splits:
        media |= split.pictures
        media |= split.clips
        for kind in ("images", "audio"):
            (out / kind / split.name).mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in split.records)
        (out / f"{split.name}.jsonl").write_text(lines, encoding="utf-8")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda path: media[path].save(out / path), media))
    check_all_different(out / path for path in media)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert size < MAX_BYTES, f"the sample takes {size} bytes, more than {MAX_BYTES}"
    for split in splits:
        print(split.name, dict(Counter(record["type"] for record in split.records)))
    print(f"{len(media)} media, {size / 1e6:.2f} MB in all")


if __name__ == "__main__":
    main()
