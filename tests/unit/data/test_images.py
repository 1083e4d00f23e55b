import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.data.builders import PeakMemory, png, png_of
from train.data import images
from train.data.images import image_size, load_image, to_rgb
from train.errors import BadRecord
from train.families.megrezo.slices import SliceSettings, slices_of


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def quarters() -> Image.Image:
    """An image of 80 x 40 with red in its upper left corner."""
    image = Image.new("RGB", (80, 40), "white")
    image.paste("red", (0, 0, 40, 20))
    return image


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "red_corner"),
    [(1, "00"), (2, "10"), (3, "11"), (4, "01"), (5, "00"), (6, "10"), (7, "11"), (8, "01")],
)
def test_exif_orientation(form, orientation, red_corner):
    data = encoded(quarters(), form, exif=exif(orientation))
    size = (80, 40) if orientation <= 4 else (40, 80)
    assert image_size(data) == size
    image = load_image(data)
    assert (image.size, image.mode) == (size, "RGB")
    right, below = (int(flag) for flag in red_corner)
    corner = image.getpixel((5 + right * (size[0] - 10), 5 + below * (size[1] - 10)))
    assert corner[0] > 200
    assert corner[1] < 60


def test_size_of_a_png_is_read_without_decoding():
    whole = png(640, 480)
    assert image_size(whole[: len(whole) // 2]) == (640, 480)


def test_damaged_exif_does_not_spoil_the_image():
    assert image_size(encoded(quarters(), "JPEG", exif=b"Exif\0\0garbage")) == (80, 40)


def test_an_orientation_that_does_not_exist():
    data = encoded(quarters(), "JPEG", exif=exif(9))
    assert image_size(data) == load_image(data).size == (80, 40)


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 255)), (0, 0, 0)),
        (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 0x8000, np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.full((4, 4), 0x4000, np.int32)), (64, 64, 64)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("RGB", (4, 4), "blue").quantize(), (0, 0, 255)),
    ],
)
def test_every_mode_becomes_rgb(image, pixel):
    rgb = to_rgb(image)
    assert (rgb.mode, rgb.getpixel((2, 2))) == ("RGB", pixel)


def test_transparent_palette_and_deep_png():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0])
    assert load_image(encoded(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 0xC000, np.uint16))
    assert load_image(encoded(deep, "PNG")).getpixel((0, 0)) == (192, 192, 192)


def test_broken_and_forbidden_files(tmp_path, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    cut = encoded(noise, "PNG")[:4000]
    assert image_size(cut) == (64, 64)
    for function, data, reason in (
        (load_image, cut, "cannot be read"),
        (image_size, b"not an image", "begins with b'not an image', which is no intact JPEG, PNG"),
        (image_size, b"%!PS-Adobe-3.0 EPSF", "which is no intact JPEG, PNG"),
    ):
        with pytest.raises(BadRecord, match=f"embedded image.* {reason}"):
            function(data)
    with pytest.raises(BadRecord, match=r"image '.*gone\.jpg' cannot be read"):
        image_size(str(tmp_path / "gone.jpg"))
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 64 - 1)
    for function in (image_size, load_image):
        with pytest.raises(BadRecord, match="has 64x64 pixels, more than the 4095 allowed"):
            function(encoded(noise, "PNG"))


def test_a_bomb_is_refused_by_its_header():
    header = bytearray(png(1, 1))
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # the size in IHDR
    with pytest.raises(BadRecord):
        image_size(bytes(header))


def test_patches_are_channel_major_and_row_by_row():
    """4 x 4 pixels in patches of 2: red counts pixels row by row, green and blue are constant."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[..., 0] = np.arange(16).reshape(4, 4)
    pixels[..., 1], pixels[..., 2] = 100, 200
    patches, sizes = slices_of(Image.fromarray(pixels), SliceSettings(max_slices=1, scale=4, patch=2))
    assert sizes.tolist() == [[2, 2]]
    green_blue = [100] * 4 + [200] * 4
    assert patches.tolist() == [
        [0, 1, 4, 5, *green_blue],
        [2, 3, 6, 7, *green_blue],
        [8, 9, 12, 13, *green_blue],
        [10, 11, 14, 15, *green_blue],
    ]
    assert patches.dtype == torch.uint8


def test_anchor_of_the_model_card():
    """1480 x 720: a thumbnail of 644 x 308, then 3 x 2 cells of 518 x 378, row by row."""
    image = Image.new("RGB", (1480, 720))
    for column in range(3):
        for row in range(2):
            box = (column * 494, row * 360, (column + 1) * 494, (row + 1) * 360)
            image.paste((column * 100, row * 100, 0), box)
    patches, sizes = slices_of(image, SliceSettings())
    assert sizes.tolist() == [[22, 46]] + [[27, 37]] * 6
    assert patches.shape == (22 * 46 + 6 * 27 * 37, 588)
    cells = patches[22 * 46 :].view(6, 27, 37, 3, 14, 14)[:, 13, 18, :, 7, 7]
    assert cells[:, :2].tolist() == [[0, 0], [100, 0], [200, 0], [0, 100], [100, 100], [200, 100]]


def test_slices_equal_plain_resizing_and_cropping():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (500, 1300, 3), np.uint8))
    patches, sizes = slices_of(image, SliceSettings())
    layout = SliceSettings().layout(1300, 500)
    (columns, rows), (width, height) = layout.grid, layout.cell
    refined = image.resize((columns * width, rows * height), Image.Resampling.BICUBIC)
    views = [image.resize(layout.thumbnail, Image.Resampling.BICUBIC)]
    for row in range(rows):
        for column in range(columns):
            left, top = column * width, row * height
            views.append(refined.crop((left, top, left + width, top + height)))
    begin = 0
    for view, (high, wide) in zip(views, sizes.tolist(), strict=True):
        pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1)
        expected = torch.nn.functional.unfold(pixels[None].float(), 14, stride=14)[0].T
        assert torch.equal(patches[begin : begin + high * wide].float(), expected)
        begin += high * wide
    assert begin == len(patches)


@pytest.mark.parametrize("size", [(2**16, 1), (1, 2**16), (2**26, 1)])
def test_the_longer_side_is_bounded(size):
    for data in (png(*size, 0, "1"), png_of(*size)):
        for read in (image_size, load_image):
            with pytest.raises(BadRecord, match=r"pixels, and a side may have 65535; cut it into several"):
                read(data)


@pytest.mark.parametrize("size", [(2**16 - 1, 1), (1, 2**16 - 1)])
def test_the_longest_sides_are_used(size):
    data = png(*size, 1, "1")
    patches, sizes = slices_of(load_image(data), SliceSettings())
    layout = SliceSettings().layout(*image_size(data))
    assert len(patches) == sizes.prod(dim=1).sum() == layout.patches(14)
    assert patches.min() == 255


def test_webp_may_have_half_as_many_pixels():
    with pytest.raises(BadRecord, match="it has 8192x4097 pixels, more than the 33554432 allowed"):
        image_size(encoded(Image.new("L", (8192, 4097)), "WEBP", quality=0, method=0))


def test_a_header_is_read_again_when_the_file_has_changed(tmp_path, monkeypatch):
    file = tmp_path / "image.png"
    with pytest.raises(BadRecord, match="No such file"):
        image_size(str(file))
    file.write_bytes(encoded(Image.new("RGB", (80, 40)), "PNG"))
    opened = []
    monkeypatch.setattr(
        Image, "open", lambda *given, really=Image.open, **named: opened.append(1) or really(*given, **named)
    )
    assert [image_size(str(file)) for _ in range(3)] == [(80, 40)] * 3
    assert len(opened) == 1
    file.write_bytes(encoded(Image.new("RGB", (8, 400)), "PNG"))
    assert image_size(str(file)) == (8, 400)


def test_the_tile_of_a_tiff_is_bounded():
    """A decoder holds all of it, whatever the image's size."""
    tags = {256: 100, 257: 100, 258: 8, 259: 5, 262: 1, 277: 1, 322: 65_536, 323: 65_536, 324: 0, 325: 0}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    with pytest.raises(BadRecord, match="its tiles have 65536x65536 pixels, more than 4194304; save it anew"):
        image_size(data)


@pytest.mark.parametrize(
    ("form", "mode", "size", "options"),
    [
        ("TIFF", "I", (8192, 8192), {"compression": "tiff_lzw"}),
        ("WEBP", "RGBA", (8192, 4096), {"lossless": True, "method": 0}),
    ],
)
def test_the_largest_images_take_less_than_a_gib(form, mode, size, options):
    data = encoded(Image.new(mode, size), form, exif=exif(6), **options)
    with PeakMemory() as peak:
        assert slices_of(load_image(data), SliceSettings())[0].shape[1] == 588
    assert peak.mib < 1024


@pytest.mark.parametrize("mode", ["LA", "RGBA", "I;16", "I"])
def test_strips_make_the_same_image(monkeypatch, mode):
    random = np.random.default_rng(0)
    bands = len(Image.new(mode, (1, 1)).getbands())
    depth, most = (np.uint8, 256) if bands > 1 else (np.uint16, 65_536)
    pixels = random.integers(0, most, (37, 23, bands), dtype=depth).squeeze()
    image = Image.fromarray(pixels.astype(np.int32) if mode == "I" else pixels)
    assert image.mode == mode
    whole = to_rgb(image)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 100)
    assert to_rgb(image).tobytes() == whole.tobytes()
