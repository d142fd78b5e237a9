"""Masks that come as small PNG files: read with bounds, whatever their bytes say. Imports no torch."""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 64 * 1024
"""Of one file. Black and white of 1024×1024 pixels takes a few thousand."""
MAX_SIDE = 2048
MAX_TEXT = 4 * -(-MAX_BYTES // 3)
"""Characters of base64."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_FAULTS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


class MaskUnreadable(ValueError):
    """What is wrong with a mask, in words that follow its name."""


def decoded(text: str) -> bytes:
    """The file in base64. Raises MaskUnreadable."""
    if len(text) > MAX_TEXT:
        raise MaskUnreadable(f"is over {MAX_BYTES} bytes; store it in black and white, or smaller")
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise MaskUnreadable("is no base64") from error


def read_mask(text: str) -> Image:
    """The mask as a picture of mode L, 255 where it is white; transparent pixels are black.

    Raises:
        MaskUnreadable: it is no base64, no PNG, too large, or damaged.
    """
    from PIL import Image

    data = _bare(decoded(text))
    try:
        with Image.open(BytesIO(data), formats=("PNG",)) as opened:
            black = Image.new("RGBA", opened.size, (0, 0, 0, 255))
            flat = Image.alpha_composite(black, opened.convert("RGBA")).convert("L")
    except _FAULTS as error:
        raise MaskUnreadable(f"can not be read as a PNG: {error}") from error
    return flat.point([255 if value >= 128 else 0 for value in range(256)])


def _bare(data: bytes) -> bytes:
    """Header, palette and pixels of a PNG; texts and profiles, which may unpack to anything, are left out."""
    if not data.startswith(_SIGNATURE):
        raise MaskUnreadable("is no PNG")
    kept, position = [_SIGNATURE], len(_SIGNATURE)
    while position + 12 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        kind, stop = data[position + 4 : position + 8], position + 12 + length
        if stop > len(data):
            break
        if kind == b"IHDR":
            _check_size(data[position + 8 : stop - 4])
        if kind in _NEEDED:
            kept.append(data[position:stop])
        position = stop
        if kind == b"IEND":
            return b"".join(kept)
    raise MaskUnreadable("is a PNG that was cut off")


def _check_size(header: bytes) -> None:
    if len(header) != 13:
        raise MaskUnreadable("is a PNG with a damaged header")
    width, height, depth = struct.unpack(">IIB", header[:9])
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise MaskUnreadable(f"has {width}×{height} pixels; sides are from 1 to {MAX_SIDE}")
    if depth > 8:
        raise MaskUnreadable(f"has {depth} bits a channel; store it with 8 or fewer")
