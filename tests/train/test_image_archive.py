"""Zips of images: captions found, every bad image named, and nothing that a hostile archive can do."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from artifacts.errors import ArchiveRefused, FileBroken, RequestInvalid, TooLarge
from train.image_archive import SUITABLE
from train.inspection import inspect_apart
from train.records import Limits
from train.rows import find_format, inspect, iter_rows


def png(width: int = 8, height: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (200, 10, 10)).save(out, "PNG")
    return out.getvalue()


def write(path: Path, files: dict[str, bytes | str], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def captions(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_captions_come_from_a_file_of_them_or_from_texts_beside_the_images(tmp_path: Path) -> None:
    listed = write(
        tmp_path / "listed.zip",
        {"set/metadata.jsonl": captions({"file_name": "b/1.png", "text": "one", "more": 3}), "set/b/1.png": png()},
    )
    assert list(iter_rows(listed, "images")) == [{"file_name": "set/b/1.png", "text": "one"}]
    beside = {
        "x/1.png": png(),
        "x/1.txt": "one\n",
        "2.jpeg": png(),
        "2.txt": "\ufefftwo",
        "__MACOSX/x/1.png": b"",
        ".x": b"",
    }
    path = write(tmp_path / "beside.zip", beside)
    assert find_format(path, "beside.zip") == "images"
    assert [row["text"] for row in iter_rows(path, "images")] == ["two", "one"]
    for found in (inspect(path, "images"), inspect_apart(path, "images")):
        assert (found.rows, [column.name for column in found.columns]) == (2, ["file_name", "text"])
        assert found.tasks == (SUITABLE,)


def bomb(side: int) -> bytes:
    """A PNG whose header promises a square of that side."""
    content = bytearray(png())
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


def animated() -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:])
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GIF89a no image", "a.png is no image in PNG, JPEG or WebP"),
        (png(64, 64)[:90], "a.png can not be decoded"),
        (bomb(10_000), "a.png has 10000×10000 pixels; at most 64000000 are allowed"),
        (bomb(60_000), "a.png can not be decoded: Image size (3600000000 pixels) exceeds limit"),
        (animated(), "a.png has 2 frames; one is allowed"),
        (b"", "a.png is no image"),
    ],
    ids=["other", "cut", "large", "bomb", "animated", "empty"],
)
def test_a_bad_image_is_named_and_the_others_are_looked_at(tmp_path: Path, content: bytes, words: str) -> None:
    files = {"a.png": content, "a.txt": "a", "b.png": png(), "b.txt": "b", "c.png": png()}
    with pytest.raises(FileBroken, match="2 of 3 rows are not valid") as caught:
        inspect(write(tmp_path / "bad.zip", files), "images")
    found = {finding.pointer: finding.message for finding in caught.value.errors}
    assert found.keys() == {"row 1", "row 3"}
    assert words in found["row 1"]
    assert found["row 3"] == "c.png has no caption: there is neither metadata.jsonl nor c.txt"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"file_name": "b.png", "text": "x"}, "there is no file 'b.png' in the archive"),
        ({"file_name": "../a.png", "text": "x"}, "leads out of the archive"),
        ({"file_name": "a.png", "text": " "}, "the `text` of a.png is missing or empty"),
        ({"file_name": "a.png"}, "the `text` of a.png is missing or empty"),
        ({"text": "x"}, "`file_name` is missing, or no text"),
        ("[1]", "is a JSON array, not an object"),
    ],
)
def test_a_bad_caption_is_named(tmp_path: Path, line: Any, words: str) -> None:
    text = captions({"file_name": "a.png", "text": "good"}) + (line + "\n" if isinstance(line, str) else captions(line))
    with pytest.raises(FileBroken) as caught:
        inspect(write(tmp_path / "bad.zip", {"a.png": png(), "metadata.jsonl": text}), "images")
    assert caught.value.errors[0].pointer == "row 2"
    assert words in caught.value.errors[0].message


def linked(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("a.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return path


def test_a_hostile_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.zip"
    for files, words in (
        ({"../a.png": png(), "a.txt": "a"}, "leads out of the archive"),
        ({"/a.png": png()}, "is absolute"),
        ({"a.png": png(), "A.PNG": png()}, "in the archive twice"),
        ({"metadata.jsonl": "", "x/metadata.jsonl": ""}, "two files of captions"),
        ({"readme.md": "x"}, "The file has no rows"),
    ):
        with pytest.raises((ArchiveRefused, FileBroken), match=words):
            inspect(write(path, files), "images")
    with pytest.raises(ArchiveRefused, match="a link or a special file"):
        inspect(linked(path), "images")
    whole = write(path, {"a.png": png(), "a.txt": "a"}).read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(ArchiveRefused, match="no end record"):
        inspect(path, "images")


def test_limits_hold_for_bytes_images_and_what_a_text_unpacks_to(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", {"a.png": png(), "a.txt": "a", "b.png": png(), "b.txt": "b"})
    with pytest.raises(TooLarge, match="more than 100 bytes"):
        inspect(path, "images", Limits(max_bytes=100))
    with pytest.raises((FileBroken, ArchiveRefused), match="more than 1 images"):
        inspect(path, "images", Limits(max_images=1))
    with pytest.raises(FileBroken, match="at most 20 are allowed"):
        inspect(path, "images", Limits(max_image_bytes=20))
    large = write(tmp_path / "b.zip", {"a.png": png(), "a.txt": "x" * 10**6}, zipfile.ZIP_DEFLATED)
    with pytest.raises(FileBroken, match="has 1000000 bytes; at most 65536 are allowed"):
        inspect(large, "images")


def test_a_format_that_is_given_and_wrong_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", {"a.png": png()})
    with pytest.raises(RequestInvalid, match="The file is a zip of images, not CSV"):
        find_format(path, "a.zip", "csv")
    (tmp_path / "a.csv").write_text("a,b\n")
    assert find_format(tmp_path / "a.csv", "a.csv", "images") == "images"
    with pytest.raises(ArchiveRefused, match="no end record"):
        inspect(tmp_path / "a.csv", "images")
