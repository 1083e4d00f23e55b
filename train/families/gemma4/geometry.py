"""Sizes and places of recordings, by plain arithmetic."""

HOP, FRAME = 160, 320
"""Samples between two mel frames, and of one."""

LONGEST = 480_000
"""Samples of the longest clip that is heard: 30 s at 16 kHz."""


def mel_frames(samples: int) -> int:
    """Mel frames of a clip of so many samples at 16 kHz: those that end within it, the first of them half before it.

    >>> mel_frames(16_000)
    99
    """
    return max(0, (samples + FRAME // 2 - FRAME - 1) // HOP + 1)


def halved(frames: int) -> int:
    """What a convolution of stride 2 leaves."""
    return (frames + 1) // 2


def clip_places(frames: int) -> int:
    """Token places of a clip of so many mel frames, 40 ms each; 0 if it is too short to be heard.

    >>> clip_places(2999)
    750
    """
    return halved(halved(frames))
