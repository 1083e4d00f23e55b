"""Images: their size from the header, and their pixels."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from train.data.media import head_of, header_of, reading, remembered
from train.errors import BadRecord
from train.schema import MediaFile

MAX_PIXELS = 2**26
"""Largest image that is decoded: 67 megapixels, 256 MiB as RGB in Pillow."""

MAX_WEBP_PIXELS = 2**25
"""Largest WebP image that is decoded: its decoder holds two more copies of it."""

MAX_SIDE = 2**16 - 1
"""Longest side of an image that is decoded: resizing takes memory for each pixel of a side."""

_MAX_TILE_PIXELS = 2**22
"""Largest tile of a TIFF: its decoder holds a whole one, whatever the size of the image."""

_STRIP_PIXELS = 2**20
"""Pixels that are converted at a time."""

# Named one by one, because some of Pillow's other formats run external programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

_FLIPS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image of that EXIF orientation upright."""


@remembered
def image_size(source: MediaFile) -> tuple[int, int]:
    """(width, height) in pixels of the upright image, from its header; BadRecord if broken or too large."""
    with _opened(source, header_only=True) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def load_image(source: MediaFile) -> Image.Image:
    """The upright image as RGB, transparency laid on white; BadRecord if it is broken or too large."""
    with _opened(source) as image:
        orientation = _orientation(image)
        decoded = to_rgb(image)
        return decoded.transpose(_FLIPS[orientation]) if orientation in _FLIPS else decoded


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB, transparency laid on white."""
    if not image.mode.startswith("I") and not image.has_transparency_data:
        return image.convert("RGB")
    made = Image.new("RGB", image.size)
    rows = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):  # the steps between would each take as much as the image
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        made.paste(_strip_to_rgb(strip), (0, top))
    return made


def _strip_to_rgb(strip: Image.Image) -> Image.Image:
    if strip.mode.startswith("I"):
        deep = np.asarray(strip).clip(0, 2**16 - 1)
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    layer = strip.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


@contextmanager
def _opened(source: MediaFile, header_only: bool = False) -> Iterator[Image.Image]:
    """The image, its header read and its size checked; whatever goes wrong with it becomes a BadRecord."""
    with (
        reading("image", source, "replace it by a valid JPEG or PNG") as file,
        header_of(file) if header_only else nullcontext(file) as opened,
    ):
        try:
            with Image.open(opened, formats=_FORMATS) as image:
                _check_size(image)
                yield image
        except UnidentifiedImageError:
            raise BadRecord(
                f"it begins with {head_of(file)!r}, which is no intact {', '.join(_FORMATS)}; replace it"
            ) from None


def _check_size(image: Image.Image) -> None:
    """Raise BadRecord where decoding could take more than some hundred MiB."""
    width, height = image.size
    most = MAX_WEBP_PIXELS if image.format == "WEBP" else MAX_PIXELS
    if width * height > most:
        raise BadRecord(f"it has {width}x{height} pixels, more than the {most} allowed; scale it down")
    if max(width, height) > MAX_SIDE:
        raise BadRecord(f"it has {width}x{height} pixels, and a side may have {MAX_SIDE}; cut it into several")
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        tile = tags.get(TiffImagePlugin.TILEWIDTH, 0), tags.get(TiffImagePlugin.TILELENGTH, 0)
        if tile[0] * tile[1] > _MAX_TILE_PIXELS:
            raise BadRecord(f"its tiles have {tile[0]}x{tile[1]} pixels, more than {_MAX_TILE_PIXELS}; save it anew")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that is left to apply, 1 (upright) to 8."""
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    # Asked for EXIF that its header lacks, Pillow decodes a whole PNG to search behind the pixels.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata does not spoil the pixels
        return 1
    return int(orientation) if orientation in range(1, 9) else 1
