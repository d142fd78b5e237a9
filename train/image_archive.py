"""A zip of images with captions, from a stranger: read in place, every image and every text bounded.

Captions are in `metadata.jsonl` (objects of `file_name`, counted from the folder that it lies in, and `text`), or, if
there is none, in a text file beside each image. Pillow is imported only when images are decoded.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from artifacts.archives import check_central_directory, check_zip_entry, clean_name, refusing_damage
from artifacts.errors import ArchiveRefused, FieldError, FileBroken, TooLarge
from train import json_lines
from train.records import Faults, Limits, Row, Suitability

if TYPE_CHECKING:
    from PIL.Image import Image

ZIP_MAGIC = b"PK"
COLUMNS = ("file_name", "text")
SUITABLE = Suitability("text-to-image", "images", ("file_name", "text"), True)
METADATA = "metadata.jsonl"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
KINDS = ("PNG", "JPEG", "WEBP")

_MAX_METADATA_BYTES = 256 * 1024**2
_MAX_CAPTION_BYTES = 64 * 1024
_FILES_PER_IMAGE = 2
_HIDDEN = re.compile(r"(^|/)(__MACOSX/|\.)")


class ImageArchive:
    """The files of a zip that are images or captions, by their paths.

    Args:
        file: can seek; it stays open as long as the archive is used.

    Raises:
        ArchiveRefused: no zip, damaged, encrypted, links, paths that lead out, a name twice, too many entries.
        TooLarge: more bytes, unpacked, than allowed.
    """

    def __init__(self, file: BinaryIO, limits: Limits) -> None:
        self._limits = limits
        with refusing_damage("zip"):
            check_central_directory(file, _FILES_PER_IMAGE * limits.max_images + 1)
            file.seek(0)
            self._zip = zipfile.ZipFile(file)
            self.files = self._entries(self._zip.infolist())

    def _entries(self, infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
        found: dict[str, zipfile.ZipInfo] = {}
        seen: set[str] = set()
        total = 0
        for info in infos:
            check_zip_entry(info)
            name = clean_name(info.orig_filename)
            if info.is_dir():
                continue
            if name.casefold() in seen:
                raise ArchiveRefused(f"{name[:80]!r} is in the archive twice.")
            seen.add(name.casefold())
            total += info.file_size
            if total > self._limits.max_bytes:
                raise TooLarge(f"The archive holds more than {self._limits.max_bytes} bytes.")
            if not _HIDDEN.search(name):
                found[name] = info
        return found

    @property
    def images(self) -> list[str]:
        """Paths, sorted."""
        return sorted(name for name in self.files if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES)

    def read(self, name: str, limit: int) -> bytes:
        """A file's bytes. Raises ValueError, which says what is wrong with it."""
        info = self.files[name]
        if info.file_size > limit:
            raise ValueError(f"{name} has {info.file_size} bytes; at most {limit} are allowed")
        try:
            with refusing_damage("zip"), self._zip.open(info) as source:
                content = source.read(limit + 1)
        except ArchiveRefused as error:
            raise ValueError(f"{name} is damaged: {error.detail}") from error
        if len(content) != info.file_size:
            raise ValueError(f"{name} has another size than the archive says")
        return content

    def image(self, name: str) -> Image:
        """An image, decoded, turned as its EXIF data says, in RGB. Raises ValueError, which says what is wrong."""
        return _decode(name, self.read(name, self._limits.max_image_bytes), self._limits.max_pixels)


@dataclass(frozen=True, slots=True)
class _Caption:
    """Where a row comes from: an image's path and its text, or what is wrong."""

    name: str
    text: str = ""
    fault: str | None = None


def read(file: BinaryIO, limits: Limits, faults: Faults, skip: int = 0) -> Iterator[tuple[int, Row]]:
    """The rows (`file_name`, `text`) with their numbers; those that are not valid go to `faults`. Decodes no image.

    Raises:
        ArchiveRefused, FileBroken, TooLarge: about the archive as a whole.
    """
    archive = ImageArchive(file, limits)
    places = sorted((name for name in archive.files if PurePosixPath(name).name == METADATA), key=_depth)
    if len(places) > 1:
        both = f"{places[0]} and {places[1]}"
        raise FileBroken(f"There are two files of captions: {both}.", hint=f"Join them in one {METADATA}.")
    captions = _listed(archive, places[0], limits) if places else _beside(archive)
    for number, caption in enumerate(captions, 1):
        if number > limits.max_images:
            raise FileBroken(f"There are more than {limits.max_images} images.", hint="Split the archive.")
        if caption.fault is not None:
            faults.add(number, caption.fault)
        elif number > skip:
            yield number, {"file_name": caption.name, "text": caption.text}


def decoded(
    file: BinaryIO, rows: Iterator[tuple[int, Row]], limits: Limits, faults: Faults
) -> Iterator[tuple[int, Row]]:
    """The rows whose images can be decoded; the others go to `faults`."""
    archive = ImageArchive(file, limits)
    for number, row in rows:
        try:
            archive.image(row["file_name"]).close()
        except ValueError as error:
            faults.add(number, str(error))
        else:
            yield number, row


def _depth(name: str) -> tuple[int, str]:
    return name.count("/"), name


def _listed(archive: ImageArchive, place: str, limits: Limits) -> Iterator[_Caption]:
    """The captions of `metadata.jsonl`."""
    try:
        content = archive.read(place, _MAX_METADATA_BYTES)
    except ValueError as error:
        raise FileBroken(f"{error}.") from error
    folder = PurePosixPath(place).parent
    broken = _Broken()
    for _, row in json_lines.read(io.BytesIO(content), limits, broken):
        yield from (_Caption("", fault=f"{place}: {text}") for text in broken.take())
        yield _caption(archive, folder, row)
    yield from (_Caption("", fault=f"{place}: {text}") for text in broken.take())


def _caption(archive: ImageArchive, folder: PurePosixPath, row: Mapping[str, object]) -> _Caption:
    given, text = row.get("file_name"), row.get("text")
    if not isinstance(given, str) or not given:
        return _Caption("", fault="`file_name` is missing, or no text")
    try:
        name = clean_name(str(folder / given))
    except ArchiveRefused as error:
        return _Caption(given, fault=error.detail)
    if name not in archive.files:
        return _Caption(name, fault=f"there is no file {name!r} in the archive")
    if not isinstance(text, str) or not text.strip():
        return _Caption(name, fault=f"the `text` of {name} is missing or empty")
    return _Caption(name, text)


def _beside(archive: ImageArchive) -> Iterator[_Caption]:
    """The captions of text files beside the images."""
    for name in archive.images:
        place = str(PurePosixPath(name).with_suffix(".txt"))
        if place not in archive.files:
            yield _Caption(name, fault=f"{name} has no caption: there is neither {METADATA} nor {place}")
            continue
        try:
            text = archive.read(place, _MAX_CAPTION_BYTES).decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            yield _Caption(name, fault=f"{place} is not UTF-8")
        except ValueError as error:
            yield _Caption(name, fault=str(error))
        else:
            yield _Caption(name, text, None if text else f"{place} is empty")


class _Broken(Faults):
    """Lines of the captions file that can not be read, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self._texts: list[str] = []

    def add(self, row: int, reason: str) -> None:
        del row
        self._texts.append(reason)

    def take(self) -> list[str]:
        found, self._texts = self._texts, []
        return found


@contextmanager
def _sizes_are_ours() -> Iterator[None]:
    """Pillow warns of images that are large for it: the limit here is our own."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode(name: str, content: bytes, max_pixels: int) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with _sizes_are_ours(), Image.open(io.BytesIO(content), formats=KINDS) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise ValueError(f"{name} has {width}×{height} pixels; at most {max_pixels} are allowed")
            frames = int(getattr(opened, "n_frames", 1))
            if frames > 1:
                raise ValueError(f"{name} has {frames} frames; one is allowed")
            opened.load()
            return ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no image in PNG, JPEG or WebP") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} can not be decoded: {error}") from error


def broken_image(number: int, problem: str) -> FileBroken:
    """For an image that was found valid before."""
    return FileBroken(f"row {number}: {problem}", errors=[FieldError(f"row {number}", problem)])
