"""Random changes of sound and images in training, as far as torchaudio and Pillow have them.

What is drawn for a record is a function of the seed, the epoch and the record: it does not depend on workers, ranks, or
where a run was stopped. Speed changes lengths, so it is drawn where packs are planned (`plan.Speeds`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from train.data.audio import SAMPLE_RATE, clip_length, fit_clip, load_clip, speed_ratio
from train.errors import BadRecord, OmniTuneError
from train.schema import Span

_TELEPHONE_RATE = 8_000
_TELEPHONE_BAND = (300.0, 3400.0)
"""Hz"""
_TAPS = 129
_DIRECT_DB = (0.0, 12.0)
"""How much louder the sound that comes straight is than its generated echo, in dB: drawn between these."""
_LONGEST_MASK = 0.3
"""Share of a clip that a mask over time covers at most."""


@dataclass(frozen=True)
class Augmentation:
    """What may be changed in the media of a source; the fields are those of `config.AugmentOptions`."""

    share: float = 0.5
    speed: Sequence[float] = ()
    noise_db: Sequence[float] = ()
    noise_folder: str | None = None
    echo_s: Sequence[float] = ()
    echo_folder: str | None = None
    gain_db: Sequence[float] = ()
    telephone: bool = False
    freq_mask: int = 0
    time_mask: int = 0
    masks: int = 2
    color: float = 0.0
    jpeg: Sequence[int] = ()

    @property
    def is_on(self) -> bool:
        """Whether anything is changed."""
        return self.hears or self.color > 0 or bool(self.jpeg)

    @property
    def hears(self) -> bool:
        """Whether sound is changed, for which torchaudio is needed."""
        lists = (self.speed, self.noise_db, self.echo_s, self.gain_db)
        return any(lists) or bool(self.echo_folder) or self.telephone or self.freq_mask > 0 or self.time_mask > 0


class Augmenter:
    """The changes of every record of a run.

    of_sources: of each source; None where nothing is changed.
    """

    def __init__(self, of_sources: Sequence[Augmentation | None], seed: int):
        self.of_sources, self.seed = list(of_sources), seed
        if any(settings and settings.hears for settings in of_sources):
            _torchaudio()

    def changes(self, source: int, record: int, epoch: int, speed: float) -> "Changes | None":
        """Those of a record in an epoch, at the speed that was drawn for it."""
        settings = self.of_sources[source]
        return Changes(settings, np.random.default_rng([self.seed, epoch, record]), speed) if settings else None


class Changes:
    """The changes of one record: each call draws the next."""

    def __init__(self, settings: Augmentation, rng: np.random.Generator, speed: float = 1.0):
        self.settings, self.speed = settings, speed
        self._rng = rng

    def sound(self, clip: np.ndarray, samples: int) -> np.ndarray:
        """A clip at 16 kHz, changed: float32 (samples,), of the length that it has at this speed."""
        with _one_thread():
            return self._changed(torch.from_numpy(np.ascontiguousarray(clip, np.float32))[None], samples)

    def _changed(self, made: Tensor, samples: int) -> np.ndarray:
        if self.speed != 1:
            made = _resampler(*speed_ratio(self.speed))(made)
            made = torch.from_numpy(fit_clip(made[0].numpy(), samples, tolerance=0.01))[None]
        for change, is_asked in self._of_sound:
            if is_asked and self._rng.random() < self.settings.share and made.any():
                made = change(made)
        return made[0].numpy()

    @property
    def _of_sound(self) -> list[tuple[Callable[[Tensor], Tensor], bool]]:
        """In the order in which a voice reaches a listener: the room, its noises, the line, its loudness."""
        settings = self.settings
        return [
            (self._echo, bool(settings.echo_s) or bool(settings.echo_folder)),
            (self._noise, bool(settings.noise_db)),
            (self._telephone, settings.telephone),
            (self._gain, bool(settings.gain_db)),
        ]

    def _echo(self, clip: Tensor) -> Tensor:
        response = self._response()
        made = _convolved(clip, response)[:, : clip.shape[1]]
        return made * (clip.norm() / made.norm().clamp(min=1e-9))

    def _response(self) -> Tensor:
        """An impulse response, (1, samples): a recorded one from where it is loudest, or noise that dies away."""
        if self.settings.echo_folder:
            recorded = _recording("data.augment.echo_folder", self._one_of(self.settings.echo_folder))
            return torch.from_numpy(recorded[np.abs(recorded).argmax() :].copy())[None]
        seconds = self._between(self.settings.echo_s)
        at = np.arange(round(seconds * SAMPLE_RATE), dtype=np.float32)
        tail = self._rng.standard_normal(len(at), dtype=np.float32)
        tail *= np.exp(at * np.float32(-3 * np.log(10) / (seconds * SAMPLE_RATE)))  # 60 dB in that time
        tail[0] = np.linalg.norm(tail) * 10 ** (self._rng.uniform(*_DIRECT_DB) / 20)
        return torch.from_numpy(tail)[None]

    def _noise(self, clip: Tensor) -> Tensor:
        ratio = self._between(self.settings.noise_db)
        folder = self.settings.noise_folder
        noise = self._recorded_noise(folder, clip.shape[1]) if folder else self._coloured_noise(clip.shape[1])
        if not noise.any():
            return clip
        of_clip = torch.from_numpy(noise)[None]
        return _torchaudio().functional.add_noise(clip, of_clip, torch.tensor([ratio], dtype=torch.float32))

    def _coloured_noise(self, samples: int) -> np.ndarray:
        """Noise whose power falls with the frequency: not at all (white) to with its square (brown)."""
        length = _fast_length(samples)
        spectrum = self._rng.standard_normal((length // 2 + 1, 2), dtype=np.float32)
        spectrum *= np.arange(1, len(spectrum) + 1, dtype=np.float32)[:, None] ** np.float32(-self._rng.uniform(0, 1))
        return np.fft.irfft(spectrum.view(np.complex64)[:, 0], length)[:samples].astype(np.float32)

    def _recorded_noise(self, folder: str, samples: int) -> np.ndarray:
        """A stretch of a recording, or all of a short one again and again."""
        file = self._one_of(folder)
        try:
            room = clip_length(file) - samples
            begin = self._rng.integers(room) / SAMPLE_RATE if room > 0 else 0.0
            noise = load_clip(Span(file, begin), samples)
        except BadRecord as fault:
            raise OmniTuneError(f"data.augment.noise_folder: {fault}") from None
        return np.resize(noise, samples)

    def _telephone(self, clip: Tensor) -> Tensor:
        """300 to 3,400 Hz, and 8 bits on the µ-law's scale, at 8,000 samples a second."""
        functional = _torchaudio().functional
        narrow = _resampler(SAMPLE_RATE, _TELEPHONE_RATE)(clip)
        narrow = torch.nn.functional.conv1d(narrow[None], _band_pass()[None, None], padding=_TAPS // 2)[0]
        peak = narrow.abs().max().clamp(min=1e-9)
        narrow = functional.mu_law_decoding(functional.mu_law_encoding(narrow / peak, 256), 256) * peak
        return _resampler(_TELEPHONE_RATE, SAMPLE_RATE)(narrow)[:, : clip.shape[1]]

    def _gain(self, clip: Tensor) -> Tensor:
        return clip * 10 ** (self._between(self.settings.gain_db) / 20)

    def mel(self, mel: Tensor) -> Tensor:
        """Log-mel frames (frames, bins), some of them and some bins put to the mean of all (SpecAugment)."""
        settings = self.settings
        if not (settings.freq_mask or settings.time_mask):
            return mel
        masked = _masks(settings.masks, settings.time_mask, settings.freq_mask)
        with _one_thread(), torch.random.fork_rng(devices=[]):  # torchaudio draws from torch's own generator
            torch.default_generator.manual_seed(int(self._rng.integers(2**62)))  # and not those of idle devices
            return masked(mel.T).T.contiguous()

    def image(self, image: Image.Image) -> Image.Image:
        """An RGB image with other brightness, contrast and colours, and the traces of a JPEG file."""
        settings = self.settings
        if settings.color and self._rng.random() < settings.share:
            for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = kind(image).enhance(self._rng.uniform(1 - settings.color, 1 + settings.color))
        if settings.jpeg and self._rng.random() < settings.share:
            file = BytesIO()
            low, high = settings.jpeg
            image.save(file, "JPEG", quality=int(self._rng.integers(low, high + 1)))
            image = Image.open(file).convert("RGB")
        return image

    def _between(self, ends: Sequence[float]) -> float:
        low, high = ends
        return float(self._rng.uniform(low, high))

    def _one_of(self, folder: str) -> str:
        files = _files(folder)
        return files[self._rng.integers(len(files))]


def _torchaudio() -> Any:
    try:
        import torchaudio
    except (ImportError, OSError) as error:
        raise OmniTuneError(
            f"data.augment changes sound by torchaudio, which cannot be imported ({error}); it is the extra `audio`, "
            "which ./launch.sh installs, and docs/data.md#torchaudio says how to by hand"
        ) from None
    return torchaudio


@lru_cache
def _resampler(rate: int, new_rate: int) -> Any:
    return _torchaudio().transforms.Resample(rate, new_rate)


@lru_cache
def _masks(count: int, frames: int, bins: int) -> Any:
    return _torchaudio().transforms.SpecAugment(
        n_time_masks=count if frames else 0,
        time_mask_param=frames,
        n_freq_masks=count if bins else 0,
        freq_mask_param=bins,
        iid_masks=False,
        p=_LONGEST_MASK,
    )


def _convolved(clip: Tensor, response: Tensor) -> Tensor:
    """The whole convolution, (1, samples), and zeros behind it: the transform is fast at few lengths."""
    whole = clip.shape[1] + response.shape[1] - 1
    padded = torch.nn.functional.pad(response, (0, _fast_length(whole) - whole))
    return _torchaudio().functional.fftconvolve(clip, padded)


def _fast_length(samples: int) -> int:
    """The next of 2ⁿ and 3·2ⁿ."""
    power = 1 << max(samples - 1, 1).bit_length()
    return min(length for length in (power, power * 3 // 4) if length >= samples)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums over several threads round otherwise than over one, which workers have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache
def _files(folder: str) -> list[str]:
    """The files of a folder, in the order of their names."""
    found = sorted(str(file) for file in Path(folder).rglob("*") if file.is_file() and not file.name.startswith("."))
    if not found:
        raise OmniTuneError(f"data.augment: there is no file in '{folder}'; name a folder of recordings")
    return found


@lru_cache(maxsize=64)
def _recording(option: str, file: str) -> np.ndarray:
    try:
        return load_clip(file)
    except BadRecord as fault:
        raise OmniTuneError(f"{option}: {fault}") from None


@lru_cache
def _band_pass() -> Tensor:
    """The windowed difference of two low-pass filters: float32 (taps,)."""
    at = np.arange(_TAPS) - _TAPS // 2
    low, high = (2 * edge / _TELEPHONE_RATE * np.sinc(2 * edge / _TELEPHONE_RATE * at) for edge in _TELEPHONE_BAND)
    return torch.from_numpy(((high - low) * np.hamming(_TAPS)).astype(np.float32))
