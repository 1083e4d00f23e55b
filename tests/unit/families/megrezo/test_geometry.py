import pytest

from train.data.audio import clip_samples
from train.families.megrezo.geometry import (
    ImageLayout,
    audio_places,
    best_size,
    encoder_frames,
    image_layout,
    mel_frames,
    pool_factor,
    pooled_frames,
    slice_grid,
)


def layout(width: int, height: int, **settings) -> ImageLayout:
    return image_layout(width, height, **({"scale": 448, "patch": 14, "max_slices": 9} | settings))


@pytest.mark.parametrize(
    ("size", "expected", "slices", "patches"),
    [
        # The two published anchors.
        ((1480, 720), ImageLayout((644, 308), (3, 2), (518, 378)), 7, 46 * 22 + 6 * 37 * 27),
        ((4000, 500), ImageLayout((1260, 154), (8, 1), (448, 448)), 9, 90 * 11 + 8 * 32 * 32),
        # A small image is scaled up whole, a tall one is cut into rows.
        ((112, 112), ImageLayout((448, 448)), 1, 32 * 32),
        ((448, 448), ImageLayout((448, 448)), 1, 32 * 32),
        ((1, 1), ImageLayout((448, 448)), 1, 32 * 32),
        ((500, 900), ImageLayout((336, 602), (1, 2), (476, 420)), 3, 24 * 43 + 2 * 34 * 30),
        # Never less than one patch high.
        ((1_000_000, 1), ImageLayout((14, 14), (6, 1), (166_670, 14)), 7, 1 + 6 * 11_905),
    ],
)
def test_image_layout(size, expected, slices, patches):
    found = layout(*size)
    assert (found, found.slices, found.patches(14)) == (expected, slices, patches)


def test_settings_of_the_layout():
    assert layout(1480, 720, max_slices=1) == ImageLayout((644, 308))
    assert layout(1480, 720, max_slices=2).grid == (2, 1)
    assert layout(96, 96, scale=64, patch=8) == ImageLayout((64, 64), (2, 2), (64, 64))
    with pytest.raises(ValueError, match="0x5"):
        layout(0, 5)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((448, 448), (0, 0)),
        ((449, 448), (2, 1)),
        ((450, 450), (1, 2)),  # as far as (2, 1), and first
        ((1344, 1344), (3, 3)),
        ((10_000, 10_000), (3, 3)),
        ((4000, 500), (8, 1)),
        ((100, 4000), (1, 3)),
    ],
)
def test_slice_grid(size, grid):
    assert slice_grid(*size, scale=448, max_slices=9) == grid


def test_best_size_keeps_small_images_unless_told():
    assert best_size(100, 50, 448, 14, upscale=False) == (98, 56)
    assert best_size(100, 50, 448, 14, upscale=True) == (630, 322)
    assert best_size(3, 3, 448, 14, upscale=False) == (14, 14)


@pytest.mark.parametrize(
    ("samples", "mel", "encoded", "places"),
    [
        (0, 0, 0, 0),
        (159, 0, 0, 0),
        (160, 2, 1, 0),
        (479, 2, 1, 0),
        (480, 4, 2, 3),
        (1600, 10, 5, 4),
        (16_000, 100, 50, 27),
        (16_160, 102, 51, 27),
        (480_000, 3000, 1500, 752),
    ],
)
def test_audio(samples, mel, encoded, places):
    assert (mel_frames(samples), encoder_frames(samples), audio_places(samples)) == (mel, encoded, places)


@pytest.mark.parametrize(("avg_pool", "places"), [(True, 752), (2, 752), (False, 1502), (1, 1502), (3, 502)])
def test_pooling_in_its_published_type(avg_pool, places):
    assert audio_places(480_000, pool=pool_factor(avg_pool)) == places


@pytest.mark.parametrize("avg_pool", [0, -1, 2.0, "true", None, [2]])
def test_any_other_pooling_is_refused_by_name(avg_pool):
    with pytest.raises(ValueError, match=r"audio_config\.avg_pool is .*; it must be true"):
        pool_factor(avg_pool)


def test_audio_settings():
    assert audio_places(16_000, bos_eos=False) == 25
    assert audio_places(16_000, pool=1) == 52
    assert (pooled_frames(5, 2), pooled_frames(1, 2), pooled_frames(6, 3)) == (2, 0, 2)


def test_clip_samples_rounds_up():
    assert [clip_samples(seconds) for seconds in (0, 1, 1 / 3, 44_101 / 44_100)] == [0, 16_000, 5_334, 16_001]
    assert clip_samples(0.1) == 1600
