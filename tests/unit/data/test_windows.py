"""Where long recordings are cut: at quiet places, into as many windows as the length alone tells."""

import numpy as np
import pytest

from train.data.windows import window_count, window_cuts

RATE = 16_000
LONGEST, FRAME = 30 * RATE, 640


def noise(seconds: float, *quiet: tuple[float, float]) -> np.ndarray:
    """Noise with silence from one second to another."""
    clip = np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)
    for begin, end in quiet:
        clip[round(begin * RATE) : round(end * RATE)] = 0
    return clip


def test_a_cut_lies_in_the_pause_near_the_end() -> None:
    """55 s are two windows; the cut may lie from 25 to 30 s. The last place on a frame of 40 ms whose 0.1 s before and
    after are silent, in silence from 26 to 26.4 s, is 26.28 s: the one before 26.3 s.
    """
    clip = noise(55, (10, 11), (26, 26.4))
    assert window_cuts(len(clip), LONGEST, FRAME, clip) == [0, round(26.28 * RATE), len(clip)]


def test_later_windows_begin_where_the_one_before_ends() -> None:
    """95 s: shares of 23.75 s. After a cut at 24.96 s, 70.04 s are left for three windows, so 23.35 s each: the next
    may be cut from 24.96 + 23.35 - 2.5 = 45.81 s to 50.81 s.
    """
    clip = noise(95, (24.66, 25.09), (45.9, 46.15), (52, 53))
    cuts = window_cuts(len(clip), LONGEST, FRAME, clip)
    assert [round(cut / RATE, 2) for cut in cuts[:3]] == [0, 24.96, 46.04]


@pytest.mark.parametrize("seconds", [30.001, 31, 54.99, 55, 55.01, 80, 95, 130.02, 160, 999.99])
@pytest.mark.parametrize("seed", range(3))
def test_windows_are_within_bounds_wherever_it_is_quiet(seconds: float, seed: int) -> None:
    samples = round(seconds * RATE)
    places = np.random.default_rng(seed).uniform(0, seconds, round(seconds))
    clip = noise(seconds, *[(place, place + 0.3) for place in places])
    for given in (clip, None):
        cuts = window_cuts(samples, LONGEST, FRAME, given)
        windows = np.diff(cuts)
        assert len(windows) == window_count(samples, LONGEST)
        assert windows.max() <= LONGEST
        assert windows.min() >= 10 * RATE
        assert not (np.array(cuts[:-1]) % FRAME).any()


def test_silence_and_a_short_recording() -> None:
    assert window_cuts(LONGEST, LONGEST, FRAME, np.zeros(LONGEST, np.float32)) == [0, LONGEST]
    silent = np.zeros(55 * RATE, np.float32)
    assert window_cuts(len(silent), LONGEST, FRAME, silent) == window_cuts(len(silent), LONGEST, FRAME)
