"""How large an image or a recording becomes: grids, slices, patches, mel frames, token places.

Plain arithmetic on sizes, known before anything is decoded; it imports nothing. Sizes of images
are (width, height) in pixels, as Pillow gives them; sizes in patches are (height, width), as the
published `tgt_sizes` has them.
"""

from dataclasses import dataclass
from math import ceil, log, sqrt

HOP = 160
"""Samples between two mel frames (10 ms)."""


@dataclass(frozen=True)
class ImageLayout:
    """What an image is cut into: one thumbnail, then `grid` cells row by row (none if it is small).

    `thumbnail` and `cell` are (width, height) in pixels, multiples of the patch; `grid` is
    (columns, rows), (0, 0) where the image is not sliced.
    """

    thumbnail: tuple[int, int]
    grid: tuple[int, int] = (0, 0)
    cell: tuple[int, int] = (0, 0)

    @property
    def slices(self) -> int:
        """Images that the vision tower sees: the thumbnail and the cells."""
        return 1 + self.grid[0] * self.grid[1]

    def patches(self, patch: int) -> int:
        """Patches of all slices together."""
        cells = self.grid[0] * self.grid[1]
        return (self.thumbnail[0] * self.thumbnail[1] + cells * self.cell[0] * self.cell[1]) // patch**2


def _to_multiple(length: float, unit: int) -> int:
    return max(round(length / unit) * unit, unit)


def best_size(width: float, height: float, scale: int, patch: int, *, upscale: bool) -> tuple[int, int]:
    """The size of about scale×scale pixels nearest in shape, in whole patches.

    An image of smaller area keeps its size (up to rounding) unless `upscale`.
    """
    if upscale or width * height > scale**2:
        ratio = width / height
        height = int(scale / sqrt(ratio))
        width = int(height * ratio)
    return _to_multiple(width, patch), _to_multiple(height, patch)


def slice_grid(width: int, height: int, scale: int, max_slices: int) -> tuple[int, int]:
    """(columns, rows) of the grid nearest in shape to the image; (0, 0) where one image is enough."""
    multiple = min(ceil(width * height / scale**2), max_slices)
    if multiple <= 1:
        return 0, 0
    grids = [
        (columns, count // columns)
        for count in (multiple - 1, multiple, multiple + 1)
        if 1 < count <= max_slices
        for columns in range(1, count + 1)
        if count % columns == 0
    ]
    shape = log(width / height)
    return min(grids, key=lambda grid: abs(shape - log(grid[0] / grid[1])))


def image_layout(width: int, height: int, *, scale: int, patch: int, max_slices: int) -> ImageLayout:
    """How an image of width×height pixels is resized and sliced.

    >>> layout = image_layout(1480, 720, scale=448, patch=14, max_slices=9)
    >>> layout.grid, layout.thumbnail, layout.cell, layout.slices
    ((3, 2), (644, 308), (518, 378), 7)
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels has no area")
    columns, rows = slice_grid(width, height, scale, max_slices)
    if not columns:
        return ImageLayout(best_size(width, height, scale, patch, upscale=True))
    cell_width = _to_multiple(width, columns) / columns
    cell_height = _to_multiple(height, rows) / rows
    return ImageLayout(
        thumbnail=best_size(width, height, scale, patch, upscale=False),
        grid=(columns, rows),
        cell=best_size(cell_width, cell_height, scale, patch, upscale=True),
    )


def encoder_frames(samples: int) -> int:
    """Frames after the audio encoder's two convolutions (20 ms each), for samples at 16 kHz; 0 if too short."""
    mel = samples // HOP
    return (mel - 1) // 2 + 1 if mel > 0 else 0


def mel_frames(samples: int) -> int:
    """Mel frames that a clip alone hands to the encoder: an even number, two for each encoder frame."""
    return 2 * encoder_frames(samples)


def pool_factor(avg_pool: object) -> int:
    """Encoder frames that become one, of `audio_config.avg_pool`: true = 2, false = 1, an integer = itself.

    The published type is the boolean; folders that early versions of this project wrote state the factor.

    >>> pool_factor(True), pool_factor(False), pool_factor(3)
    (2, 1, 3)
    """
    if isinstance(avg_pool, bool):
        return 2 if avg_pool else 1
    if isinstance(avg_pool, int) and avg_pool > 0:
        return avg_pool
    raise ValueError(
        f"audio_config.avg_pool is {avg_pool!r}; it must be true (2 frames become one), false (no pooling), "
        "or how many frames become one, a whole number"
    )


def pooled_frames(encoded: int, pool: int = 2) -> int:
    """Frames left of `encoded` ones after average-pooling `pool` by `pool`; 0 if too short."""
    return (encoded - pool) // pool + 1 if encoded >= pool else 0


def audio_places(samples: int, *, pool: int = 2, bos_eos: bool = True) -> int:
    """Token places of a clip: its pooled frames and, if `bos_eos`, the begin and end embeddings.

    0 means that the clip is too short to give a frame.

    >>> audio_places(30 * 16_000)
    752
    """
    frames = pooled_frames(encoder_frames(samples), pool)
    return frames + 2 * bos_eos if frames else 0
