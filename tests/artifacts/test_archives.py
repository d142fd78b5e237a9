from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifacts.archives import ArchiveLimits, archive_kind, unpack
from artifacts.errors import ArchiveRefused, PickleRefused, RequestInvalid, TooLarge

LIMITS = ArchiveLimits(max_bytes=1024 * 1024, max_entries=20)
FILES = {"top/adapter_config.json": b"{}", "top/adapter_model.safetensors": bytes(range(256)) * 40}
ROOMY = ArchiveLimits(max_bytes=64 * 1024 * 1024, max_entries=20)


def zipped(files: Mapping[str, bytes], *, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def tarred(files: Mapping[str, bytes], *, compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if compressed else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def tarred_member(**attributes: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("entry")
        for name, value in attributes.items():
            setattr(member, name, value)
        archive.addfile(member)
    return buffer.getvalue()


BUILDERS: dict[str, Callable[[Mapping[str, bytes]], bytes]] = {
    "zip": zipped,
    "tar": tarred,
    "tar.gz": lambda files: tarred(files, compressed=True),
}


@pytest.fixture
def unpacked(tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """Unpack bytes; whatever happens, nothing may be outside the destination, and nothing in it after a refusal."""

    def run(
        content: bytes, limits: ArchiveLimits = LIMITS, wanted: Callable[[str], bool] = lambda _: True
    ) -> dict[str, bytes]:
        archive, destination = tmp_path / "upload", tmp_path / "out"
        archive.write_bytes(content)
        destination.mkdir()
        try:
            written = unpack(archive, destination, limits, wanted=wanted)
        except RequestInvalid:
            assert list(destination.iterdir()) == []
            raise
        finally:
            assert {entry.name for entry in tmp_path.iterdir()} == {"upload", "out"}
        return {str(path.relative_to(destination)): path.read_bytes() for path in written}

    return run


Unpacked = Callable[..., dict[str, bytes]]


def refused(unpacked: Unpacked, content: bytes, limits: ArchiveLimits = LIMITS) -> str:
    with pytest.raises(ArchiveRefused) as caught:
        unpacked(content, limits)
    return caught.value.detail


@pytest.mark.parametrize("kind", BUILDERS)
def test_round_trip_by_magic_bytes(unpacked: Unpacked, tmp_path: Path, kind: str) -> None:
    content = BUILDERS[kind](FILES)
    assert unpacked(content) == FILES
    assert archive_kind(tmp_path / "upload") == kind


@pytest.mark.parametrize("kind", BUILDERS)
def test_unwanted_files_are_checked_but_not_written(unpacked: Unpacked, kind: str) -> None:
    content = BUILDERS[kind](FILES)
    assert list(unpacked(content, wanted=lambda name: name.endswith(".json"))) == ["top/adapter_config.json"]


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/etc/evil", "\\evil", "C:\\evil", "c:evil", "a\\..\\..\\evil", "..", "a/.."]
)
def test_paths_that_lead_out(unpacked: Unpacked, kind: str, name: str) -> None:
    assert "absolute or leads out" in refused(unpacked, BUILDERS[kind]({name: b"x"}))


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("name", ["a\nb", "x" * 301, "a" * 250, "a\x1b[31m", "\u202ea"])
def test_names_that_nobody_should_see(unpacked: Unpacked, kind: str, name: str) -> None:
    refused(unpacked, BUILDERS[kind]({name: b"x"}))


def test_zip_name_with_nul(unpacked: Unpacked) -> None:
    content = zipped({"adapterXconfig": b"{}"}).replace(b"adapterXconfig", b"adapter\0config")
    assert "can not be printed" in refused(unpacked, content)


def test_symlink_in_a_zip(unpacked: Unpacked) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("adapter_model.safetensors")
        info.create_system = 3
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    assert "link" in refused(unpacked, buffer.getvalue())


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar(unpacked: Unpacked, kind: bytes) -> None:
    assert "link or a special file" in refused(unpacked, tarred_member(type=kind, linkname="/etc/passwd"))


def test_sparse_member_of_a_tar(unpacked: Unpacked) -> None:
    refused(unpacked, tarred_member(type=tarfile.GNUTYPE_SPARSE))


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("inner", BUILDERS)
@pytest.mark.parametrize("name", ["inner.zip", "inner.tar.gz", "adapter_model.safetensors"])
def test_archive_inside_the_archive(unpacked: Unpacked, kind: str, inner: str, name: str) -> None:
    assert "archive inside the archive" in refused(unpacked, BUILDERS[kind]({name: BUILDERS[inner](FILES)}))


def test_unwanted_archive_inside_the_archive(unpacked: Unpacked) -> None:
    with pytest.raises(ArchiveRefused, match="archive inside"):
        unpacked(zipped({"other.zip": zipped(FILES)}), wanted=lambda _name: False)


@pytest.mark.parametrize("magic", [b"(\xb5/\xfd", b"\xfd7zXZ\0", b"BZh9", b"7z\xbc\xaf'\x1c", b"Rar!\x1a\x07"])
def test_other_archives_are_named(unpacked: Unpacked, magic: bytes) -> None:
    assert "archives are not accepted" in refused(unpacked, magic + bytes(600))


def test_no_archive(unpacked: Unpacked) -> None:
    assert "no archive" in refused(unpacked, b"hello")


def test_bomb_in_a_zip(unpacked: Unpacked) -> None:
    assert "times its size" in refused(unpacked, zipped({"adapter_model.safetensors": bytes(32 * 1024 * 1024)}), ROOMY)


def test_bomb_in_a_tar_gz(unpacked: Unpacked) -> None:
    content = BUILDERS["tar.gz"]({"adapter_model.safetensors": bytes(32 * 1024 * 1024)})
    assert "times its size" in refused(unpacked, content, ROOMY)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_bomb_in_a_member_that_is_not_wanted(unpacked: Unpacked, kind: str) -> None:
    content = BUILDERS[kind]({"optimizer.pt": bytes(32 * 1024 * 1024), "adapter_config.json": b"{}"})
    with pytest.raises(ArchiveRefused, match="times its size"):
        unpacked(content, ROOMY, lambda name: name.endswith(".json"))


@pytest.mark.parametrize("kind", BUILDERS)
def test_more_bytes_than_allowed(unpacked: Unpacked, kind: str) -> None:
    with pytest.raises(TooLarge, match="more than 5000 bytes"):
        unpacked(BUILDERS[kind](FILES), ArchiveLimits(max_bytes=5000, max_entries=20))


@pytest.mark.parametrize("kind", BUILDERS)
def test_more_entries_than_allowed(unpacked: Unpacked, kind: str) -> None:
    content = BUILDERS[kind]({f"{number}.json": b"{}" for number in range(21)})
    assert "more than 20 entries" in refused(unpacked, content)


def test_central_directory_of_millions_of_entries_is_not_read(unpacked: Unpacked) -> None:
    content = bytearray(zipped(FILES))
    at = content.rfind(b"PK\5\6")
    content[at + 12 : at + 16] = struct.pack("<I", 2**31)
    assert "more than 20 entries" in refused(unpacked, bytes(content))


@pytest.mark.parametrize("kind", BUILDERS)
def test_one_name_twice_even_in_other_case(unpacked: Unpacked, kind: str) -> None:
    assert "twice" in refused(unpacked, BUILDERS[kind]({"README.md": b"a", "readme.md": b"b"}))


@pytest.mark.parametrize("kind", BUILDERS)
def test_file_and_folder_of_one_name(unpacked: Unpacked, kind: str) -> None:
    assert "file and a folder" in refused(unpacked, BUILDERS[kind]({"a": b"x", "a/b": b"y"}))


def test_encrypted_zip(unpacked: Unpacked) -> None:
    content = bytearray(zipped({"a.json": b"{}"}))
    central = content.find(b"PK\1\2")
    content[central + 8] |= 1
    assert "encrypted" in refused(unpacked, bytes(content))


def test_unusual_compression(unpacked: Unpacked) -> None:
    assert "unusual method" in refused(unpacked, zipped({"a.json": b"{}" * 50}, method=zipfile.ZIP_LZMA))


def test_zip_that_lies_about_a_size(unpacked: Unpacked) -> None:
    content = bytearray(zipped({"a.json": b"{}" * 5000}))
    central = content.find(b"PK\1\2")
    content[central + 24 : central + 28] = struct.pack("<I", 10)
    refused(unpacked, bytes(content))


def test_zip_with_a_wrong_checksum(unpacked: Unpacked) -> None:
    content = zipped({"a.json": b"{'secret'}"}, method=zipfile.ZIP_STORED).replace(b"secret", b"public")
    assert "broken" in refused(unpacked, content)


def test_pytorch_checkpoint(unpacked: Unpacked) -> None:
    with pytest.raises(PickleRefused, match=r"data\.pkl"):
        unpacked(zipped({"archive/data.pkl": b"\x80\2}q\0.", "archive/version": b"3\n"}))


def test_huge_extended_header_of_a_tar(unpacked: Unpacked) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.json")
        member.pax_headers = {"comment": "x" * (2 * 1024 * 1024)}
        archive.addfile(member)
    assert "header of more than 1 MB" in refused(unpacked, buffer.getvalue(), ROOMY)


def test_chain_of_extended_headers(unpacked: Unpacked) -> None:
    record = tarfile.TarInfo("././@LongLink")
    record.type, record.size = tarfile.GNUTYPE_LONGNAME, 2
    block = record.tobuf(tarfile.GNU_FORMAT) + b"a\0".ljust(512, b"\0")
    refused(unpacked, block * 3000)


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated(unpacked: Unpacked, kind: str, share: float) -> None:
    content = BUILDERS[kind]({"a.safetensors": bytes(range(256)) * 400})
    refused(unpacked, content[: int(len(content) * share)])


def test_damaged_gzip_stream(unpacked: Unpacked) -> None:
    content = bytearray(gzip.compress(tarred(FILES)))
    content[len(content) // 2] ^= 0xFF
    refused(unpacked, bytes(content))


@settings(
    deadline=None,
    derandomize=True,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    kind=st.sampled_from(sorted(BUILDERS)),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damage_raises_nothing_but_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, kind: str, changes: list[tuple[float, int]]
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(BUILDERS[kind]({"a/adapter_config.json": b'{"r": 8}', "a/README.md": b"text " * 20}))
    for position, value in changes:
        content[int(position * len(content))] = value
    (folder / "upload").write_bytes(content)
    (folder / "out").mkdir()
    try:
        written = unpack(folder / "upload", folder / "out", LIMITS)
    except (ArchiveRefused, PickleRefused, TooLarge):
        assert list((folder / "out").iterdir()) == []
    else:
        assert all(path.is_relative_to(folder / "out") and path.is_file() for path in written)
