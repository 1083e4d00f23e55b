"""How an image is cut: a thumbnail and the cells of a grid, each into patches."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.families.megrezo.geometry import ImageLayout, image_layout

_layout_of = lru_cache(maxsize=4096)(image_layout)


@dataclass(frozen=True, slots=True)
class SliceSettings:
    """How images are cut: cells of about `scale`² pixels in patches of `patch`², at most `max_slices`."""

    max_slices: int = 9
    scale: int = 448
    patch: int = 14

    def layout(self, width: int, height: int) -> ImageLayout:
        """The layout of an image of that many pixels."""
        return _layout_of(width, height, scale=self.scale, patch=self.patch, max_slices=self.max_slices)


def slices_of(image: Image.Image, settings: SliceSettings) -> tuple[Tensor, Tensor]:
    """The patches of the thumbnail, then of the cells row by row.

    Args:
        image: RGB, upright.

    Returns:
        patches: uint8 (P, 3·patch²), each patch channel by channel, patches row by row in their slice.
        slice_sizes: int64 (S, 2), height and width of each slice in patches.
    """
    layout, patch = settings.layout(*image.size), settings.patch
    columns, rows = layout.grid
    patches = [_patches(image, layout.thumbnail, (1, 1), patch)]
    sizes = [layout.thumbnail]
    if columns:
        refined = (columns * layout.cell[0], rows * layout.cell[1])
        patches.append(_patches(image, refined, layout.grid, patch))
        sizes += [layout.cell] * (columns * rows)
    slice_sizes = torch.tensor([(height // patch, width // patch) for width, height in sizes])
    return torch.from_numpy(np.concatenate(patches)), slice_sizes


def _patches(image: Image.Image, size: tuple[int, int], grid: tuple[int, int], patch: int) -> np.ndarray:
    """The resized image cut into a grid of cells, each into patches: uint8 (P, 3·patch²)."""
    columns, rows = grid
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    cells = pixels.reshape(rows, size[1] // rows // patch, patch, columns, size[0] // columns // patch, patch, 3)
    # (row, y, patch y, column, x, patch x, channel) -> (row, column, y, x, channel, patch y, patch x)
    return cells.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * patch * patch)
