"""Sizes and places of images and recordings, by plain arithmetic."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

HOP = 160
"""Samples of a mel frame: 10 ms."""

MOST_ASPECT = 200
"""How many times longer than the other an image's side may be."""


def image_pixels(width: int, height: int, *, multiple: int, least: int, most: int) -> tuple[int, int]:
    """Width and height to which an image is scaled: both multiples of `multiple`, with `least` to `most` pixels.

    The published `smart_resize`. Raises ValueError where one side is over 200 times as long as the other.

    >>> image_pixels(300, 200, multiple=28, least=3136, most=12_845_056)
    (308, 196)
    """
    if max(height, width) > MOST_ASPECT * min(height, width):
        raise ValueError(
            f"it has {width}x{height} pixels, and one side may be {MOST_ASPECT} times as long as the other at most"
        )
    rows, columns = round(height / multiple), round(width / multiple)
    if rows * columns * multiple**2 > most:
        scale = math.sqrt((height * width) / most)
        rows, columns = (max(1, math.floor(side / scale / multiple)) for side in (height, width))
    elif rows * columns * multiple**2 < least:
        scale = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * scale / multiple) for side in (height, width))
    return columns * multiple, rows * multiple


def mel_frames(samples: int) -> int:
    """Mel frames of a clip of so many samples at 16 kHz; the last may be a part of one."""
    return -(-samples // HOP)


def clip_places(frames: int) -> int:
    """Token places of a clip of so many mel frames, 40 ms each; 0 if it is too short to be heard.

    >>> clip_places(300)
    75
    """
    return (frames + 1) // 2 // 2


def positions(tokens: int, images: Iterable[tuple[int, int, int]]) -> Tensor:
    """Three rows of positions (time, row, column): int64 (3, tokens).

    They advance alike over text and sound. An image's places hold the first, and span its rows and columns in the
    others; what follows goes on after the largest of them.

    Args:
        images: of each the token of its first place, its rows and its columns of places.
    """
    pieces: list[Tensor] = []
    done = position = 0
    for first, rows, columns in images:
        pieces.append((position + torch.arange(first - done)).expand(3, -1))
        position += first - done
        of_row, of_column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
        pieces.append(position + torch.stack([torch.zeros_like(of_row), of_row, of_column]))
        position += max(rows, columns)
        done = first + rows * columns
    pieces.append((position + torch.arange(tokens - done)).expand(3, -1))
    return torch.cat(pieces, dim=1)
