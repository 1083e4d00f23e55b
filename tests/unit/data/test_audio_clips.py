import contextlib
import io
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from tests.unit.data.builders import by_av, tone, wav
from train.data import audio
from train.data.audio import clip_length, fit_clip, load_clip, log_mel
from train.errors import BadRecord
from train.families.megrezo.geometry import mel_frames
from train.schema import Span


def encoded(samples: np.ndarray, rate: int, form: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


def pitch(clip: np.ndarray) -> float:
    """The loudest frequency in Hz of a clip at 16 kHz."""
    return float(np.abs(np.fft.rfft(clip)).argmax() * 16_000 / len(clip))


@pytest.mark.parametrize(
    ("form", "subtype", "rate"),
    [
        ("WAV", "PCM_16", 24_000),
        ("WAV", "FLOAT", 16_000),
        ("WAV", "PCM_U8", 8_000),
        ("FLAC", None, 44_100),
        ("OGG", "VORBIS", 22_050),
        ("OGG", "OPUS", 48_000),
        ("MP3", None, 44_100),
        ("MP3", None, 16_000),
    ],
)
def test_formats_and_rates(form, subtype, rate):
    data = encoded(tone(1.5, rate, channels=2), rate, form, subtype)
    length, clip = clip_length(data), load_clip(data)
    assert clip.dtype == np.float32
    assert clip.ndim == 1
    # MP3 adds its encoder's delay; the others hold what was written.
    assert abs(length - 24_000) <= (0 if form != "MP3" else 2000)
    assert abs(len(clip) - length) <= 1
    assert pitch(clip) == pytest.approx(440, abs=2)
    assert np.abs(clip[4000:20_000]).max() == pytest.approx(0.3, abs=0.03)


def test_m4a_through_pyav():
    data = by_av(tone(1.5, 44_100), 44_100, "mp4", "aac")
    assert clip_length(data) == pytest.approx(24_000, abs=1100)
    clip = load_clip(data)
    assert len(clip) == pytest.approx(24_000, abs=1100)
    assert pitch(clip) == pytest.approx(440, abs=2)
    assert 7_000 <= len(load_clip(data, 1000)) <= 10_000


def test_without_pyav_the_message_names_it(monkeypatch):
    data = by_av(tone(0.2), 16_000, "mp4", "aac")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadRecord, match=r"PyAV, which may, is not installed \(`pip install av`\)"):
        clip_length(data)


def test_a_list_of_other_files_is_not_followed(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "secret.wav").write_bytes(wav(1.0))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/secret.wav\n#EXT-X-ENDLIST\n"
    with pytest.raises(BadRecord, match="is no recording that can be read"):
        load_clip(playlist.encode())


def test_channels_are_averaged():
    left_right = np.stack([np.full(1600, 0.5), np.full(1600, -0.25)], axis=1).astype(np.float32)
    assert np.allclose(load_clip(encoded(left_right, 16_000, "WAV", "FLOAT")), 0.125)


@pytest.mark.parametrize("channels", [6, 8, 16, 64])
def test_channels_through_pyav_are_averaged(channels):
    """Channel c holds c / 64 all along: their mean is (channels - 1) / 128."""
    pytest.importorskip("av")
    levels = np.tile(np.arange(channels, dtype=np.float32) / 64, (16_000, 1))
    data = by_av(levels, 16_000, "matroska", "pcm_s16le")
    assert clip_length(data) == 16_000
    assert np.allclose(load_clip(data), (channels - 1) / 128, atol=1e-4)


@pytest.mark.parametrize(("form", "codec"), [("mp4", "aac"), ("matroska", "libopus"), ("ogg", "libopus")])
@pytest.mark.parametrize("channels", [6, 8])
def test_surround_sound(form, codec, channels):
    clip = load_clip(by_av(tone(1.5, 48_000, channels), 48_000, form, codec))
    assert len(clip) == pytest.approx(24_000, abs=1100)
    assert pitch(clip) == pytest.approx(440, abs=2)


def test_more_channels_than_ffmpeg_converts():
    data = by_av(tone(0.1, channels=65), 16_000, "matroska", "pcm_s16le")
    with pytest.raises(BadRecord, match="it has 65 channels; convert it to WAV or FLAC"):
        clip_length(data)


def test_one_packet_of_everything_is_not_decoded(monkeypatch):
    data = by_av(tone(0.5), 16_000, "matroska", "pcm_s16le")
    monkeypatch.setattr(audio, "_PACKET", 1000)
    with pytest.raises(BadRecord, match="a packet of it has 2048 bytes, more than 1000"):
        load_clip(data)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("read", [clip_length, load_clip])
def test_ogg_files_end_to_end_are_refused(subtype, read):
    """Only the first of them would be heard."""
    first, second = (encoded(tone(seconds), 16_000, "OGG", subtype) for seconds in (1.0, 2.0))
    for chained in (first + second, first + first):
        with pytest.raises(BadRecord, match="it is several Ogg files end to end"):
            read(chained)
    read(first)


def test_flac_of_unknown_length():
    """As an encoder writes it into a pipe: the 36 bits of the number of samples are 0."""
    data = bytearray(encoded(tone(1.0), 16_000, "FLAC"))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    with pytest.raises(BadRecord, match="embedded audio: its header states no length; convert it to WAV"):
        clip_length(bytes(data))


def test_a_false_mp3_is_refused_quickly_and_quietly(capfd):
    """Its decoder takes two seconds over each MiB, and writes 54 MB to stderr."""
    begin = time.perf_counter()
    with pytest.raises(BadRecord, match="its header does not end"):
        clip_length(b"\xff\xf3\x04\x83" * 2**20)
    assert time.perf_counter() - begin < 2
    assert capfd.readouterr().err == ""


def test_damaged_mp3_frames_are_decoded_quietly(capfd):
    frame = b"\xff\xfb\x18\xc0" + b"\xff" * 92  # 32 kbit/s at 32 kHz would be 144 bytes
    with contextlib.suppress(BadRecord):
        load_clip(frame * 2000)
    frame = b"\xff\xfb\x14\xc0" + b"\xff" * 92  # 32 kbit/s at 48 kHz: 96 bytes
    load_clip(frame * 2000)
    assert capfd.readouterr().err == ""


def test_a_wav_header_without_end(tmp_path):
    whole = wav(0.1)
    (tmp_path / "a.wav").write_bytes(whole[:36] + b"teSt\0\0\0\0" * 2**18 + whole[36:])
    with pytest.raises(BadRecord, match="its header does not end"):
        clip_length(str(tmp_path / "a.wav"))


def test_decoding_is_bounded():
    assert len(load_clip(wav(5.0), max_samples=16_000)) == 16_000 + 8_000


@pytest.mark.parametrize("data", [b"", b"not a recording", wav(1.0)[:20]])
def test_broken_files(data):
    with pytest.raises(BadRecord, match=r"embedded audio: it (begins with .* and is no recording|is empty)"):
        clip_length(data)


def test_faults_name_the_file(tmp_path):
    with pytest.raises(BadRecord, match=r"audio '.*gone\.wav' cannot be read"):
        clip_length(str(tmp_path / "gone.wav"))
    nan = encoded(np.full(1600, np.nan, np.float32), 16_000, "WAV", "FLOAT")
    with pytest.raises(BadRecord, match="samples that are not numbers"):
        load_clip(nan)


def test_fit_clip_trims_and_pads_within_the_tolerance():
    clip = np.ones(16_000, np.float32)
    assert len(fit_clip(clip, 15_000, 0.1)) == 15_000
    padded = fit_clip(clip, 17_000, 0.1)
    assert (len(padded), padded[:16_000].min(), padded[16_000:].max()) == (17_000, 1.0, 0.0)
    with pytest.raises(BadRecord, match=r"1\.00 s whose header says 0\.80 s"):
        fit_clip(clip, 12_800, 0.1)
    with pytest.raises(BadRecord, match=r"1\.00 s whose header says 1\.20 s"):
        fit_clip(clip, 19_200, 0.1)


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize(
    "samples",
    [400, 16_000, 16_001, 16_159, 24_080, 24_239, 99_999, 478_900, 479_199, 479_359, 479_999, 480_000],
)
def test_log_mel_equals_whisper_on_the_clip_padded_to_30_s(samples, bins):
    extractor = WhisperFeatureExtractor(feature_size=bins)
    clip = np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)
    # The loudest sound stands at the very end, where padding could change the maximum.
    clip[-300:] *= 20
    whole = extractor(clip, sampling_rate=16_000, return_tensors="np")["input_features"][0]
    frames = mel_frames(samples)
    mel = log_mel(clip, extractor, frames).T
    assert whole.shape == (bins, 3000)
    assert (mel.shape, mel.dtype) == ((bins, frames), torch.float32)
    assert np.abs(mel.numpy() - whole[:, :frames]).max() <= 1e-5


class TestSpans:
    """A stretch of a recording, decoded without the rest."""

    @staticmethod
    def sweep(seconds: float, rate: int) -> np.ndarray:
        """Sound that never repeats."""
        return (0.4 * np.sin(2 * np.pi * 60 * np.arange(round(seconds * rate)) ** 1.3 / rate**1.3))[:, None]

    @pytest.mark.parametrize(
        ("form", "subtype", "within"),
        [("WAV", "FLOAT", 0), ("FLAC", None, 0), ("OGG", "VORBIS", 1e-5), ("OGG", "OPUS", 2e-2), ("MP3", None, 2e-2)],
    )
    def test_a_span_is_that_stretch_of_the_whole(self, form, subtype, within):
        data = encoded(self.sweep(6.0, 16_000), 16_000, form, subtype)
        span = Span(data, 1.25, 3.5)
        whole, clip = load_clip(data), load_clip(span)
        assert clip_length(span) == len(clip) == 36_000
        assert np.abs(clip - whole[20_000:56_000]).max() <= within
        assert np.array_equal(load_clip(Span(data, 1.25)), load_clip(Span(data, 1.25, None)))
        assert clip_length(Span(data, 1.25)) == clip_length(data) - 20_000

    @pytest.mark.parametrize(("form", "codec"), [("mp4", "aac"), ("matroska", "pcm_s16le")])
    def test_a_span_through_pyav(self, form, codec):
        data = by_av(self.sweep(6.0, 16_000).astype(np.float32), 16_000, form, codec)
        whole, clip = load_clip(data), load_clip(Span(data, 2.0, 3.5))
        assert clip_length(Span(data, 2.0, 3.5)) == len(clip) == 24_000
        assert np.abs(clip - whole[32_000:56_000]).max() <= 1e-3

    def test_nothing_but_the_span_is_decoded(self, monkeypatch):
        decoded = []
        monkeypatch.setattr(audio, "resampled", lambda samples, rate: decoded.append(len(samples)) or samples)
        load_clip(Span(wav(20.0, 8_000), 12.0, 14.0))
        assert decoded == [16_000]

    @pytest.mark.parametrize(("start", "end"), [(0.5, 2.2), (2.0, None), (7.0, 8.0)])
    def test_a_span_beyond_the_end_is_refused(self, start, end):
        with pytest.raises(BadRecord, match=r"embedded audio: its span goes from .* to .* s, and it has 2\.00 s"):
            clip_length(Span(wav(2.0), start, end))
