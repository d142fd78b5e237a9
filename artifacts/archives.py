"""Archives from strangers: zip, tar and tar.gz, unpacked within limits or refused."""

from __future__ import annotations

import errno
import gzip
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from artifacts.errors import ArchiveRefused, PickleRefused, TooLarge
from artifacts.safetensors_header import looks_like_safetensors

ArchiveKind = Literal["zip", "tar", "tar.gz"]

CHUNK_BYTES = 1024 * 1024
RATIO_FREE_BYTES = 4 * 1024 * 1024
"""Below this size a high ratio is harmless: small JSON files compress well."""
MAX_NAME_LENGTH = 300
_MAX_TAR_RECORD = 1024 * 1024
"""Largest block that tarfile may ask for at once: it reads extended headers whole, however long they claim to be."""

_ZIP_TAIL_BYTES = 65536 + 22 + 76
"""Where a zip archive's end records are: the longest comment, and the records before it."""
_ZIP_ENTRY_BYTES = 1024
"""Room for one entry of the central directory: 46 bytes, a name of at most MAX_NAME_LENGTH, and extra fields."""

_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"(\xb5/\xfd", "Zstandard"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"BZh", "bzip2"),
    (b"7z\xbc\xaf'\x1c", "7-Zip"),
    (b"Rar!\x1a\x07", "RAR"),
)
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:")


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """Bounds of one archive: bytes and entries after unpacking, and bytes out per byte in."""

    max_bytes: int = 8 * 1024**3
    max_entries: int = 1000
    max_ratio: float = 20.0


def archive_kind(path: Path) -> ArchiveKind | None:
    """What `path` is by its first bytes; None when it is no archive.

    Raises:
        ArchiveRefused: an archive of a kind that is not unpacked here.
    """
    with path.open("rb") as file:
        start = file.read(512)
    return kind_of(start)


def kind_of(start: bytes) -> ArchiveKind | None:
    """As `archive_kind`, from the first 512 bytes."""
    if looks_like_safetensors(start):
        return None
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")):
        return "zip"
    if start.startswith(b"\x1f\x8b"):
        return "tar.gz"
    if start[257:262] == b"ustar":
        return "tar"
    for magic, name in _FOREIGN:
        if start.startswith(magic):
            raise ArchiveRefused(f"{name} archives are not accepted.", hint="Send a zip, tar or tar.gz.")
    return None


def unpack(
    archive: Path,
    destination: Path,
    limits: ArchiveLimits,
    *,
    wanted: Callable[[str], bool] = lambda _name: True,
) -> list[Path]:
    """Unpack `archive` into the existing, empty folder `destination`; on any refusal nothing is left in it.

    Args:
        wanted: is asked with each file's path inside the archive; other files are checked by name and size, and their
            content is never written.

    Returns:
        the written files.

    Raises:
        ArchiveRefused: no archive, broken, encrypted, a limit exceeded, a link or a special file, a path that is
            absolute or leaves the folder, a name twice, or an archive inside the archive.
        PickleRefused: the archive is a PyTorch checkpoint.
        TooLarge: more than `limits.max_bytes` after unpacking.
    """
    kind = archive_kind(archive)
    if kind is None:
        raise ArchiveRefused("This is no archive.", hint="Send a zip, tar or tar.gz.")
    unpacking = _Unpacking(archive, destination, limits, wanted)
    try:
        with refusing_damage(kind):
            if kind == "zip":
                unpacking.zip()
            else:
                unpacking.tar(compressed=kind == "tar.gz")
    except BaseException:
        for entry in destination.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        raise
    return unpacking.written


@contextmanager
def refusing_damage(kind: str) -> Iterator[None]:
    """The standard library's many ways to say that an archive is broken, as one."""
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ArchiveRefused(f"The {kind} archive is broken: {error}.") from error
    except (ValueError, LookupError, ArithmeticError, NotImplementedError, RecursionError, struct.error) as error:
        raise ArchiveRefused(f"The {kind} archive can not be read: {error}.") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ArchiveRefused(f"The {kind} archive has a file and a folder of one name.") from error
    except OSError as error:
        # seeking to where a damaged header points
        if error.errno != errno.EINVAL:
            raise
        raise ArchiveRefused(f"The {kind} archive can not be read: {error}.") from error


class _Unpacking:
    def __init__(self, archive: Path, destination: Path, limits: ArchiveLimits, wanted: Callable[[str], bool]) -> None:
        self._archive = archive
        self._destination = destination
        self._limits = limits
        self._wanted = wanted
        self._seen: set[str] = set()
        self._entries = 0
        self._bytes = 0
        self._packed = archive.stat().st_size
        self.written: list[Path] = []

    def zip(self) -> None:
        with self._archive.open("rb") as file:
            check_central_directory(file, self._limits.max_entries)
        with zipfile.ZipFile(self._archive) as archive:
            infos = archive.infolist()
            self._check_checkpoint(infos)
            for info in infos:
                self._count_entry()
                check_zip_entry(info)
                name = self._checked_name(info.orig_filename)
                if not info.is_dir():
                    _refuse_nested_name(name)
                    self._bytes += info.file_size
                    self._check_size(self._packed)
                    if self._wanted(name):
                        self._write_zipped(archive, info, name)

    def _check_checkpoint(self, infos: list[zipfile.ZipInfo]) -> None:
        for info in infos[: self._limits.max_entries]:
            if info.filename.rpartition("/")[2] == "data.pkl":
                raise PickleRefused(
                    f"This is a PyTorch checkpoint: {info.filename[:80]!r} is a pickle, which is never loaded here.",
                    hint="Save the adapter with safe_serialization=True to get a safetensors file.",
                )

    def _write_zipped(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> None:
        with archive.open(info) as source:
            size = self._write(source, name, info.file_size)
        if size != info.file_size:
            raise ArchiveRefused(f"{name!r} has {size} bytes; the archive says {info.file_size}.")

    def tar(self, *, compressed: bool) -> None:
        with self._archive.open("rb") as raw, gzip.GzipFile(fileobj=raw) as unzipped:
            bounded = _BoundedReader(unzipped if compressed else raw, raw, self._limits, compressed=compressed)
            with tarfile.open(fileobj=bounded, mode="r:") as archive:  # type: ignore[call-overload]
                for member in archive:
                    self._count_entry()
                    self._take_member(archive, member)
            while bounded.read(_MAX_TAR_RECORD):
                pass  # the checksum of a gzip stream is compared at its end, which tarfile does not read

    def _take_member(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = self._checked_name(member.name)
        if member.isdir():
            return
        if not member.isreg() or member.issparse() or member.size < 0:
            raise ArchiveRefused(f"{member.name[:80]!r} is a link or a special file.")
        try:
            tarfile.data_filter(member, str(self._destination))
        except tarfile.FilterError as error:
            raise ArchiveRefused(f"{member.name[:80]!r} is refused: {error}.") from error
        _refuse_nested_name(name)
        self._bytes += member.size
        self._check_size(None)
        if not self._wanted(name):
            return
        source = archive.extractfile(member)
        if source is None:
            raise ArchiveRefused(f"{member.name[:80]!r} has no content.")
        with source:
            self._write(source, name, member.size)

    def _count_entry(self) -> None:
        self._entries += 1
        if self._entries > self._limits.max_entries:
            raise ArchiveRefused(f"The archive has more than {self._limits.max_entries} entries.")

    def _check_size(self, packed: int | None) -> None:
        if self._bytes > self._limits.max_bytes:
            raise TooLarge(f"The archive holds more than {self._limits.max_bytes} bytes.")
        if packed is not None:
            check_ratio(self._bytes, packed, self._limits)

    def _checked_name(self, name: str) -> str:
        """The path inside the archive, harmless and seen for the first time."""
        clean = clean_name(name)
        folded = clean.casefold()
        if clean and folded in self._seen:
            raise ArchiveRefused(f"{clean[:80]!r} is in the archive twice.")
        self._seen.add(folded)
        return clean

    def _write(self, source: IO[bytes], name: str, size: int) -> int:
        """Copy at most `size` bytes into a new file; its name on disk is ours, its place that of the archive."""
        target = self._destination.joinpath(*name.split("/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        written = 0
        with target.open("xb") as file:
            while chunk := source.read(CHUNK_BYTES):
                if not written:
                    _refuse_nested(chunk, name)
                written += len(chunk)
                if written > size:
                    raise ArchiveRefused(f"{name!r} is larger than the archive says.")
                file.write(chunk)
        self.written.append(target)
        return written


def check_central_directory(file: IO[bytes], max_entries: int) -> None:
    """Bound the central directory of a zip before zipfile reads all of it into memory. Raises ArchiveRefused."""
    packed = file.seek(0, 2)
    file.seek(max(0, packed - _ZIP_TAIL_BYTES))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise ArchiveRefused("The zip archive is broken: it has no end record.")
    size = int.from_bytes(tail[at + 12 : at + 16], "little")
    if tail[at - 20 : at - 16] == b"PK\x06\x07" and at >= 76:
        # the 64-bit record, whose size counts instead
        size = int.from_bytes(tail[at - 76 + 40 : at - 76 + 48], "little")
    if size > max_entries * _ZIP_ENTRY_BYTES:
        raise ArchiveRefused(f"The archive has more than {max_entries} entries.")


def check_zip_entry(info: zipfile.ZipInfo) -> None:
    """Raises ArchiveRefused for what is no plain file or folder, or can not be read by everybody."""
    mode = info.external_attr >> 16
    if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ArchiveRefused(f"{info.filename[:80]!r} is a link or a special file.")
    if info.flag_bits & 0x1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ArchiveRefused(f"{info.filename[:80]!r} is encrypted or packed by an unusual method.")


def clean_name(name: str) -> str:
    """The path inside an archive, harmless. Raises ArchiveRefused."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if _ABSOLUTE.match(name) or ".." in parts:
        raise ArchiveRefused(f"{name[:80]!r} is absolute or leads out of the archive.")
    if len(name) > MAX_NAME_LENGTH or not name.isprintable() or any(len(part.encode()) > 200 for part in parts):
        raise ArchiveRefused(f"{name[:80]!r} is too long, or has characters that can not be printed.")
    return "/".join(parts)


def check_ratio(unpacked: int, packed: int, limits: ArchiveLimits) -> None:
    """Raises ArchiveRefused when `unpacked` bytes came out of too few `packed` ones."""
    if unpacked > max(packed, 1) * limits.max_ratio and unpacked > RATIO_FREE_BYTES:
        raise ArchiveRefused(
            f"The archive unpacks to more than {limits.max_ratio:g} times its size.",
            hint="Weights hardly compress; such an archive is taken for a bomb.",
        )


def _refuse_nested_name(name: str) -> None:
    if name.lower().endswith(_ARCHIVE_SUFFIXES):
        raise ArchiveRefused(f"{name!r} is an archive inside the archive.", hint="Pack the adapter's files directly.")


def _refuse_nested(start: bytes, name: str) -> None:
    try:
        nested = kind_of(start[:512])
    except ArchiveRefused as error:
        raise ArchiveRefused(f"{name!r} is an archive inside the archive.") from error
    if nested is not None:
        raise ArchiveRefused(f"{name!r} is an archive inside the archive.", hint="Pack the adapter's files directly.")


class _BoundedReader:
    """A file object for tarfile that counts what was unpacked, and never hands out a huge block at once."""

    def __init__(self, source: Any, packed: IO[bytes], limits: ArchiveLimits, *, compressed: bool) -> None:
        self._source = source
        self._packed = packed
        self._limits = limits
        self._compressed = compressed

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _MAX_TAR_RECORD:
            raise ArchiveRefused("The tar archive has a header of more than 1 MB.")
        data: bytes = self._source.read(size)
        self._check()
        return data

    def seek(self, position: int, whence: int = 0) -> int:
        if whence != 0:
            raise ArchiveRefused("The tar archive can not be read from its end.")
        if not self._compressed:
            return int(self._source.seek(position))
        # forward in steps, so that the bounds hold while a skipped member is inflated
        while self._source.tell() < position:
            before = self._source.tell()
            self._source.seek(min(position, before + CHUNK_BYTES))
            self._check()
            if self._source.tell() == before:
                break
        return int(self._source.tell() if self._source.tell() <= position else self._source.seek(position))

    def tell(self) -> int:
        return int(self._source.tell())

    def _check(self) -> None:
        if not self._compressed:
            return
        unpacked = self._source.tell()
        # tar adds a header and padding per entry to what the limits count
        if unpacked > self._limits.max_bytes + 4096 * (self._limits.max_entries + 64):
            raise TooLarge(f"The archive holds more than {self._limits.max_bytes} bytes.")
        check_ratio(unpacked, self._packed.tell(), self._limits)
