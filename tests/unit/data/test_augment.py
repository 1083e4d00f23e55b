"""Random changes of media: what each does to the sound, and that nothing but seed, epoch and record decides them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from tests.runs import SAMPLE, write_records
from tests.unit.data.builders import tone
from train.data.augment import Augmentation, Augmenter, Changes
from train.data.loader import StepLoader, StepPlan
from train.data.plan import Limits, Speeds
from train.data.record_set import RecordSet, SourceSpec
from train.data.workers import Workers
from train.errors import OmniTuneError
from train.families.registry import find
from train.schema import Batch

RATE = 16_000
TINY = SAMPLE.parent / "tiny"
LIMITS = Limits(512, {"image": 10_000, "audio": 10_000})
EVERYTHING = Augmentation(
    share=0.7,
    speed=(0.9, 1.0, 1.1),
    noise_db=(0, 20),
    echo_s=(0.1, 0.4),
    gain_db=(-10, 10),
    telephone=True,
    freq_mask=27,
    time_mask=40,
    color=0.3,
    jpeg=(30, 90),
)


@pytest.fixture(autouse=True)
def _torchaudio(request: pytest.FixtureRequest) -> None:
    if "without" not in request.node.name:
        pytest.importorskip("torchaudio")


def changed(clip: np.ndarray, seed: int = 0, speed: float = 1.0, samples: int = 0, **settings: Any) -> np.ndarray:
    changes = Changes(Augmentation(share=1.0, **settings), np.random.default_rng(seed), speed)
    return changes.sound(clip, samples or len(clip))


def decibels(wave: np.ndarray) -> float:
    return float(10 * np.log10(np.square(wave.astype(np.float64)).mean()))


def loudest_hertz(clip: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(clip)).argmax() * RATE / len(clip))


CLIP = tone(2.0)[:, 0]
NOISE = np.random.default_rng(7).uniform(-0.3, 0.3, 2 * RATE).astype(np.float32)


@pytest.mark.parametrize(("speed", "samples"), [(0.9, 35_556), (1.1, 29_091), (0.95, 33_685)])
def test_speed_changes_length_and_pitch(speed: float, samples: int) -> None:
    """Of 32,000 samples, 32,000 / speed rounded up; 440 Hz times the speed."""
    made = changed(CLIP, speed=speed, samples=samples)
    assert len(made) == samples
    assert loudest_hertz(made) == pytest.approx(440 * speed, abs=0.6)


@pytest.mark.parametrize("seed", range(4))
def test_noise_has_the_ratio_that_was_asked_for(seed: int) -> None:
    made = changed(CLIP, seed, noise_db=(6, 6))
    assert decibels(CLIP) - decibels(made - CLIP) == pytest.approx(6, abs=0.01)


def test_noise_of_a_folder(tmp_path: Path) -> None:
    """Of a recording shorter than the clip, again and again."""
    soundfile.write(tmp_path / "hum.wav", tone(0.5, hertz=100)[:, 0], RATE, subtype="FLOAT")
    made = changed(CLIP, noise_db=(0, 0), noise_folder=str(tmp_path)) - CLIP
    assert decibels(made) == pytest.approx(decibels(CLIP), abs=0.01)
    assert loudest_hertz(made) == pytest.approx(100, abs=0.6)
    (tmp_path / "hum.wav").write_bytes(b"no sound")
    with pytest.raises(OmniTuneError, match=r"data\.augment\.noise_folder: audio '.*hum\.wav'"):
        changed(CLIP, noise_db=(0, 0), noise_folder=str(tmp_path))


def test_echo_lasts_after_the_sound_and_dies_away() -> None:
    """A click in a room whose echo is 60 dB down after 0.3 s: 20 dB down from 0.05 s to 0.15 s."""
    click = np.zeros(RATE, np.float32)
    click[100] = 1
    made = [changed(click, seed, echo_s=(0.3, 0.3)) for seed in range(20)]
    early, later = (
        decibels(np.concatenate([clip[100 + int(at * RATE) :][:320] for clip in made])) for at in (0.05, 0.15)
    )
    assert early - later == pytest.approx(20, abs=1)
    assert all(clip.argmax() == 100 and np.linalg.norm(clip) == pytest.approx(1, abs=1e-3) for clip in made)


def test_echo_of_a_folder(tmp_path: Path) -> None:
    """An impulse response that is a click, and half a click 0.1 s later, from where it is loudest."""
    response = np.zeros(RATE, np.float32)
    response[[500, 2100]] = 1, 0.5
    soundfile.write(tmp_path / "room.wav", response, RATE, subtype="FLOAT")
    click = np.zeros(RATE, np.float32)
    click[100] = 1
    made = changed(click, echo_folder=str(tmp_path))
    assert made[1700] / made[100] == pytest.approx(0.5, abs=1e-4)
    assert np.abs(np.delete(made, [100, 1700])).max() < 1e-4


def test_the_telephone_band() -> None:
    """Up to 3,400 Hz as it was, but for the µ-law's steps; nothing from 4,000 Hz on, little under 300 Hz."""

    def lost(hertz: float) -> float:
        clip = tone(1.0, hertz=hertz)[:, 0]
        return decibels(clip[2000:-2000]) - decibels(changed(clip, telephone=True)[2000:-2000])

    assert [abs(lost(hertz)) < 0.5 for hertz in (500, 1000, 3000)] == [True] * 3
    assert lost(100) > 15
    assert lost(5000) > 30


def test_gain_and_silence() -> None:
    assert np.allclose(changed(CLIP, gain_db=(-6, -6)), CLIP * 10 ** (-6 / 20), atol=1e-6)
    silent = np.zeros(RATE, np.float32)
    assert not changed(silent, noise_db=(0, 0), echo_s=(0.1, 0.2), telephone=True, gain_db=(-6, 6)).any()


def test_masks_cover_frames_and_bins_with_the_mean() -> None:
    mel = torch.randn(300, 80, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    made = Changes(Augmentation(freq_mask=20, time_mask=50, masks=2), np.random.default_rng(3)).mel(mel)
    assert torch.equal(torch.get_rng_state(), before)
    masked = made != mel
    assert masked.any()
    assert (made[masked] - mel.mean()).abs().max() < 0.05  # the second mask's mean is that after the first
    bins, frames = masked.all(dim=0).sum(), masked.all(dim=1).sum()
    assert 0 < bins <= 40
    assert 0 < frames <= 100


def test_colours_and_jpeg_keep_the_size() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    settings = Augmentation(share=1.0, color=0.4, jpeg=(30, 30))
    made = [Changes(settings, np.random.default_rng(seed)).image(image) for seed in (1, 1, 2)]
    assert all(one.size == image.size and one.mode == "RGB" for one in made)
    assert made[0].tobytes() == made[1].tobytes() != made[2].tobytes()
    assert made[0].tobytes() != image.tobytes()
    untouched = Changes(Augmentation(share=1.0), np.random.default_rng(0))
    assert untouched.image(image) is image


def test_without_torchaudio_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(OmniTuneError, match=r"torchaudio, which cannot be imported .*extra `audio`"):
        Augmenter([EVERYTHING], seed=0)
    Augmenter([Augmentation(color=0.2, jpeg=(30, 90)), None], seed=0)  # images need none


class TestRuns:
    """Batches of an augmented run."""

    @pytest.fixture(scope="class")
    def processor(self) -> Any:
        return find(TINY).load_processor(TINY)

    def records(self, folder: Path, processor: Any, **settings: Any) -> RecordSet:
        spec = SourceSpec("train", str(folder / "train.jsonl"), str(SAMPLE))
        return RecordSet([spec], processor, max_tokens=512, too_long="quarantine", **settings)

    def loader(self, folder: Path, processor: Any, *, epoch: int = 0, step: int = 0, rank: int = 0, **how: Any) -> Any:
        """Two epochs from there on, with everything changed."""
        records = self.records(folder, processor, workers=Workers(how.pop("workers", 0)))
        measured, _ = records.measure()
        at = [self.records(folder, processor, speed=speed).measure()[0].lengths for speed in (0.9, 1.1)]
        speeds = Speeds([1.0, 0.9, 1.1], np.stack([measured.lengths, *at]), [(len(records), [0, 1, 2])], seed=5)
        plan = StepPlan(measured, [1.0], LIMITS, packs_per_step=2, seed=5, epochs=2, max_steps=None, speeds=speeds)
        settings = {"world_size": 1} | how
        augmenter = Augmenter([EVERYTHING], seed=5)
        return StepLoader(plan, records, rank=rank, epoch=epoch, step_in_epoch=step, augmenter=augmenter, **settings)

    @staticmethod
    def assert_same(found: Batch, expected: Batch) -> None:
        assert found.records == expected.records
        assert torch.equal(found.input_ids, expected.input_ids)
        assert found.media.keys() == expected.media.keys()
        for kind, media in found.media.items():
            assert torch.equal(media.values, expected.media[kind].values)

    def test_planned_lengths_are_those_of_the_batches(self, tmp_path: Path, processor: Any) -> None:
        write_records(tmp_path)
        loader = self.loader(tmp_path, processor)
        drawn = []
        for fetched in loader:
            assert not fetched.bad
            speeds = loader.plan.speeds
            lengths = speeds.lengths_in(fetched.epoch)
            drawn += speeds.drawn(fetched.epoch)[fetched.batches[0].records].tolist()
            for batch in fetched.batches:
                row = lengths[batch.records].sum(axis=0).tolist()
                assert row == [len(batch.input_ids), batch.units("image"), batch.units("audio")]
        assert set(drawn) == {0, 1, 2}

    @pytest.mark.parametrize("workers", [0, 2])
    def test_resumed_and_with_workers_the_same_bits(self, tmp_path: Path, processor: Any, workers: int) -> None:
        write_records(tmp_path)
        straight = list(self.loader(tmp_path, processor))
        first_of_second = next(i for i, fetched in enumerate(straight) if fetched.epoch == 1)
        resumed = list(self.loader(tmp_path, processor, epoch=0, step=1, workers=workers))
        for one, other in zip(straight[1:], resumed, strict=True):
            for found, expected in zip(one.batches, other.batches, strict=True):
                self.assert_same(found, expected)
        by_record = [
            {batch.records[0]: batch for fetched in part for batch in fetched.batches if len(batch.records) == 1}
            for part in (straight[:first_of_second], straight[first_of_second:])
        ]
        for record in by_record[0].keys() & by_record[1].keys():  # another epoch draws anew
            both = [part[record].media for part in by_record]
            assert any(not torch.equal(media.values, both[1][kind].values) for kind, media in both[0].items())

    def test_two_ranks_share_the_batches_of_one(self, tmp_path: Path, processor: Any) -> None:
        write_records(tmp_path)
        alone = [batch for fetched in self.loader(tmp_path, processor) for batch in fetched.batches]
        ranks = [
            batch
            for rank in (0, 1)
            for fetched in self.loader(tmp_path, processor, rank=rank, world_size=2)
            for batch in fetched.batches
        ]
        by_records = {tuple(batch.records): batch for batch in ranks if batch.records}
        assert len(by_records) == len([batch for batch in ranks if batch.records]) == len(alone)
        for batch in alone:
            self.assert_same(batch, by_records[tuple(batch.records)])

    def test_without_changes_records_are_as_they_were(self, tmp_path: Path, processor: Any) -> None:
        """The batches of a run without data.augment do not pass through here."""
        write_records(tmp_path)
        records = self.records(tmp_path, processor)
        measured, _ = records.measure()
        plan = StepPlan(measured, [1.0], LIMITS, packs_per_step=2, seed=5, epochs=1, max_steps=None)
        for fetched in StepLoader(plan, records, rank=0, world_size=1):
            for batch in fetched.batches:
                self.assert_same(batch, records.batch(batch.records)[0])

    def test_a_record_that_is_too_long_when_slowed_keeps_its_speed(self) -> None:
        """Of 100 records, half of which are not usable at factor 1."""
        lengths = np.ones((2, 100, 3), np.int64)
        lengths[1, ::2] = 0
        drawn = Speeds([1.0, 0.9], lengths, [(100, [1])], seed=0).drawn(0)
        assert drawn.tolist() == [0, 1] * 50
