"""Records as captioning and speech data have them: a seeded draw of their sizes, and samples of noise of these sizes.

The four kinds, their shares and the constants below are round figures for public data of each kind; nothing is
read from anywhere, so that a draw is the same on every machine.
"""

from dataclasses import dataclass

import numpy as np
import torch

from train.families.megrezo.geometry import HOP, audio_places, image_layout, mel_frames
from train.schema import IGNORE_INDEX, Kind, Media, Sample

SHARES = {"caption": 0.4, "speech": 0.3, "text": 0.2, "spoken_picture": 0.1}
"""Records of each kind: an image and text; a recording and its words; text alone; an image and a recording."""

IMAGES = {
    (300, 225): 0.20,
    (400, 300): 0.18,
    (336, 336): 0.12,
    (256, 384): 0.10,
    (500, 375): 0.12,
    (640, 480): 0.14,
    (480, 640): 0.06,
    (1024, 768): 0.05,
    (1920, 1080): 0.02,
    (1240, 1754): 0.01,
}
"""Width and height in pixels, and how common: captioned images of the web, which collections keep at a few hundred
pixels, then photographs, and a few screens and scans."""

SCALE, PATCH, MAX_SLICES, QUERIES = 448, 14, 9, 64
"""The published image settings."""

CLIP_SECONDS = {"speech": (11.0, 0.6), "spoken_picture": (4.0, 0.5)}
"""Median and log-deviation of a recording: sentences read from books, and spoken questions."""

SHORTEST, LONGEST = 1.0, 30.0
"""Seconds to which recordings are clipped; 30 s is the longest that the audio tower takes."""

PROMPT = {"caption": (18, 0.5), "speech": (8, 0.2), "text": (90, 1.1), "spoken_picture": (6, 0.2)}
"""Median and log-deviation of the tokens of what the user writes: speech has a fixed instruction, text a long tail."""

ANSWER = {"caption": (16, 0.6), "text": (160, 0.9), "spoken_picture": (30, 0.8)}
"""The same of the answer: a sentence for a caption, a sentence or two for a spoken question."""

TOKENS_PER_SECOND = 3.3
"""Tokens of a transcript for each second of speech: 150 words a minute."""

TEMPLATE = 40
"""Tokens of the default system turn and of the marks around each turn."""

LONGEST_TEXT = 2000
"""Most tokens of a prompt or an answer, so that every record fits into a pack of 4096."""

_IMAGE_ID = 3
_ENDS = 2
_MARKER = 2
"""A token id for whatever is neither learned nor replaced."""


@dataclass(frozen=True)
class Workload:
    """Sizes of N records, an entry each.

    kind: index in SHARES; prompt, answer: tokens; image: index in IMAGES, -1 for none;
    hundredths: of a second that the recording lasts, 0 for none.
    """

    kind: np.ndarray
    prompt: np.ndarray
    answer: np.ndarray
    image: np.ndarray
    hundredths: np.ndarray

    def lengths(self) -> np.ndarray:
        """Tokens, patches and mel frames of each record: int32 (N, 3)."""
        slices = np.array([layout.slices for layout in _LAYOUTS] + [0])[self.image]
        patches = np.array([layout.patches(PATCH) for layout in _LAYOUTS] + [0])[self.image]
        image_tokens = slices * (QUERIES + _ENDS) + np.where(slices > 0, _IMAGE_ID, 0)
        tokens = TEMPLATE + self.prompt + self.answer + image_tokens + _CLIP_TOKENS[self.hundredths]
        return np.stack([tokens, patches, _CLIP_FRAMES[self.hundredths]], axis=1).astype(np.int32)

    def sample(self, record: int, *, vocabulary: int, mel_bins: int, seed: int = 0) -> Sample:
        """A record of noise: the image, the recording, the prompt, and the answer that is learned."""
        random = torch.Generator().manual_seed(seed * 1_000_003 + record)
        tokens, patches, frames = (int(x) for x in self.lengths_of(record))
        slices = _slices(int(self.image[record]))
        first = _IMAGE_ID + 1
        image_places = [torch.arange(QUERIES) + first + number * (QUERIES + _ENDS) for number in range(len(slices))]
        before_clip = len(slices) * (QUERIES + _ENDS) + (_IMAGE_ID if slices else 0)
        places = max(int(_CLIP_TOKENS[self.hundredths[record]]) - _ENDS, 0)
        input_ids = torch.randint(_MARKER + 1, vocabulary, (tokens,), generator=random)
        is_learned = torch.arange(tokens) >= tokens - int(self.answer[record])
        media: dict[Kind, Media] = {}
        if slices:
            pixels = torch.randint(0, 256, (patches, 3 * PATCH**2), dtype=torch.uint8, generator=random)
            media["image"] = Media(pixels, torch.tensor(slices), torch.cat(image_places))
        if frames:
            mel = torch.randn(frames, mel_bins, generator=random)
            media["audio"] = Media(mel, torch.tensor([frames]), torch.arange(places) + before_clip + 1)
        return Sample(
            input_ids=input_ids.where(is_learned, _MARKER),
            position_ids=torch.arange(tokens),
            labels=input_ids.where(is_learned, IGNORE_INDEX),
            loss_weights=is_learned.float(),
            media=media,
        )

    def lengths_of(self, record: int) -> np.ndarray:
        """Tokens, patches and mel frames of one record: int32 (3,)."""
        one = slice(record, record + 1)
        fields = (self.kind, self.prompt, self.answer, self.image, self.hundredths)
        return Workload(*(field[one] for field in fields)).lengths()[0]


def draw(count: int, seed: int = 0) -> Workload:
    """Sizes of `count` records."""
    rng = np.random.default_rng(seed)
    names = list(SHARES)
    kind = rng.choice(len(names), size=count, p=list(SHARES.values()))
    prompt, answer, hundredths = (np.zeros(count, dtype=np.int64) for _ in range(3))
    for number, name in enumerate(names):
        rows = np.flatnonzero(kind == number)
        if name in CLIP_SECONDS:
            seconds = np.clip(_lognormal(rng, CLIP_SECONDS[name], len(rows)), SHORTEST, LONGEST)
            hundredths[rows] = np.round(100 * seconds)
        prompt[rows] = _text_tokens(_lognormal(rng, PROMPT[name], len(rows)))
        if name in ANSWER:
            answer[rows] = _text_tokens(_lognormal(rng, ANSWER[name], len(rows)))
        else:
            answer[rows] = _text_tokens(TOKENS_PER_SECOND * hundredths[rows] / 100)
    sees = np.isin(kind, [names.index("caption"), names.index("spoken_picture")])
    image = np.where(sees, rng.choice(len(IMAGES), size=count, p=list(IMAGES.values())), -1)
    return Workload(kind, prompt, answer, image, hundredths)


def _lognormal(rng: np.random.Generator, median_and_deviation: tuple[float, float], count: int) -> np.ndarray:
    median, deviation = median_and_deviation
    return median * np.exp(deviation * rng.standard_normal(count))


def _text_tokens(tokens: np.ndarray) -> np.ndarray:
    return np.clip(np.round(tokens), 1, LONGEST_TEXT).astype(np.int64)


def _slices(image: int) -> list[tuple[int, int]]:
    """Height and width in patches of an image's thumbnail and cells."""
    if image < 0:
        return []
    layout = _LAYOUTS[image]
    sizes = [layout.thumbnail] + [layout.cell] * (layout.slices - 1)
    return [(height // PATCH, width // PATCH) for width, height in sizes]


_LAYOUTS = [image_layout(*size, scale=SCALE, patch=PATCH, max_slices=MAX_SLICES) for size in IMAGES]
_SAMPLES = [hundredth * HOP for hundredth in range(round(100 * LONGEST) + 1)]
_CLIP_TOKENS = np.array([places + _ENDS if (places := audio_places(samples)) else 0 for samples in _SAMPLES])
_CLIP_FRAMES = np.array([mel_frames(samples) for samples in _SAMPLES])
