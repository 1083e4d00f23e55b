"""Where a recording that is longer than an audio tower takes is cut into windows.

How many windows there are, and how many frames they have together, follows from the recording's length alone: cuts lie
on whole frames, so that only the last window has a rest. So a record's tokens are known before the cuts are.
"""

from math import ceil

import numpy as np

REACH_S = 5.0
"""Seconds in which the quietest place is looked for."""

QUIET_S = 0.2
"""Seconds around a place that count for how quiet it is."""

_RATE = 16_000


def window_count(samples: int, longest: int) -> int:
    """Windows of a recording: so many that each cut has the reach to move in.

    >>> [window_count(seconds * 16_000, 30 * 16_000) for seconds in (30, 31, 55, 56, 95)]
    [1, 2, 2, 3, 4]
    """
    reach = _reach(longest)
    return 1 + max(ceil((samples - longest) / (longest - reach)), 0)


def window_cuts(samples: int, longest: int, frame: int, clip: np.ndarray | None = None) -> list[int]:
    """Where the windows begin and end, in samples at 16 kHz: 0, the cuts, `samples`.

    The windows are about equally long. Each is cut at the quietest place, the last of several, near the end of its
    share: at most half of `REACH_S` from it, and nowhere beyond `longest`.

    Args:
        longest: samples of a window at most, a multiple of `frame`.
        frame: cuts are multiples of so many samples.
        clip: float32 (samples,): the recording; None = provisional cuts, as if all of it were silence.
    """
    count, reach = window_count(samples, longest), _reach(longest)
    power = None if clip is None else np.concatenate([[0.0], np.cumsum(np.square(clip, dtype=np.float64))])
    cuts = [0]
    for left in range(count - 1, 0, -1):  # windows after this one
        begin, rest = cuts[-1], samples - cuts[-1]
        last = begin + min(rest / (left + 1) + reach / 2, longest)
        # What is left must leave every later cut its reach too.
        first = max(last - reach, samples - left * (longest - reach) - reach)
        places = np.arange(ceil(first / frame), int(last // frame) + 1) * frame
        cuts.append(int(places[-1] if power is None else places[_quietest(power, places)]))
    return [*cuts, samples]


def _quietest(power: np.ndarray, places: np.ndarray) -> int:
    """The index of the quietest place, the last of several; power: the running sum of squares of the samples."""
    half = int(QUIET_S * _RATE) // 2
    begin, end = (places - half).clip(0), (places + half).clip(None, len(power) - 1)
    loudness = (power[end] - power[begin]) / (end - begin)
    return len(places) - 1 - int(np.argmin(loudness[::-1]))


def _reach(longest: int) -> float:
    """Samples in which a cut may move: `REACH_S`, or less where windows are short."""
    return min(REACH_S * _RATE, longest / 6)
