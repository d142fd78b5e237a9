"""Masks as PNG files: every kind of picture, and every kind of attack."""

from __future__ import annotations

import base64
import random
import struct
import zlib
from io import BytesIO
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from compose.png_mask import MAX_BYTES, MAX_SIDE, MaskUnreadable, read_mask


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def png(image: Image.Image, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def half(mode: str) -> Image.Image:
    """White on the right half of 6×4 pixels."""
    image = Image.new("L", (6, 4), 0)
    image.paste(255, (3, 0, 6, 4))
    return image.convert(mode)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_header(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "LA", "P"])
def test_every_kind_of_picture_is_read(mode: str) -> None:
    mask = read_mask(as_text(png(half(mode))))
    assert (mask.mode, mask.size) == ("L", (6, 4))
    assert list(mask.tobytes()) == [0, 0, 0, 255, 255, 255] * 4


def test_transparent_pixels_are_outside_and_grey_ones_by_half() -> None:
    image = Image.new("RGBA", (4, 1), (255, 255, 255, 255))
    image.putpixel((0, 0), (255, 255, 255, 0))
    image.putpixel((1, 0), (127, 127, 127, 255))
    image.putpixel((2, 0), (128, 128, 128, 255))
    assert list(read_mask(as_text(png(image))).tobytes()) == [0, 0, 255, 255]


def test_texts_and_profiles_that_unpack_to_anything_are_not_unpacked() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (80 * 1024**2), zip=True)
    data = png(half("L"), pnginfo=info)
    assert len(data) > MAX_BYTES  # such a text alone is over the limit
    small = PngImagePlugin.PngInfo()
    small.add_text("comment", "x" * (8 * 1024**2), zip=True)  # more than Pillow lets a text unpack to
    data = png(half("L"), pnginfo=small)
    with pytest.raises(ValueError, match="too large"), Image.open(BytesIO(data)) as opened:
        opened.load()
    assert read_mask(as_text(data)).getbbox() == (3, 0, 6, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("%%%", "no base64"),
        ("ä" * 8, "no base64"),
        (as_text(b"GIF89a" + bytes(40)), "no PNG"),
        (as_text(b""), "no PNG"),
        (as_text(b"\x89PNG\r\n\x1a\n"), "cut off"),
        (as_text(png(half("L"))[:-5]), "cut off"),
        (as_text(with_header(MAX_SIDE + 1, 1)), f"sides are from 1 to {MAX_SIDE}"),
        (as_text(with_header(2**31 - 1, 2**31 - 1)), f"sides are from 1 to {MAX_SIDE}"),
        (as_text(with_header(0, 5)), f"sides are from 1 to {MAX_SIDE}"),
        (as_text(with_header(8, 8, depth=16)), "16 bits a channel"),
        (as_text(with_header(MAX_SIDE, MAX_SIDE)), "can not be read"),  # fewer pixels than it says
        (as_text(with_header(4, 4, colour=5)), "can not be read"),
        (as_text(bytes(MAX_BYTES + 3)), f"over {MAX_BYTES} bytes"),
    ],
)
def test_what_is_no_mask_is_refused(text: str, message: str) -> None:
    with pytest.raises(MaskUnreadable, match=message):
        read_mask(text)


def test_a_bomb_of_pixels_is_bounded_by_its_sides() -> None:
    """The most that 64 KiB may say: it is read, and no larger than its sides."""
    data = png(Image.new("1", (MAX_SIDE, MAX_SIDE), 1))
    assert len(data) < MAX_BYTES
    assert read_mask(as_text(data)).size == (MAX_SIDE, MAX_SIDE)


def test_damaged_files_are_read_or_refused_but_never_anything_else() -> None:
    chance = random.Random(4)
    good = png(half("P"))
    outcomes = set()
    for _ in range(600):
        data = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            outcomes.add(read_mask(as_text(bytes(data))).size)
        except MaskUnreadable:
            outcomes.add((0, 0))
    assert {(0, 0), (6, 4)} <= outcomes
