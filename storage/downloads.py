"""An adapter as one file to download: a zip of a PEFT directory, or a safetensors file that carries its configuration.

Neither is written anywhere. The layout is computed from sizes and checksums, so that the length, the ETag and any
range of it are known ahead, and the same adapter always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from artifacts.errors import BlobMissing, FieldError, RequestInvalid
from artifacts.formats.gguf import BASE_CONFIG
from artifacts.layout import CONFIG_NAME, METADATA_KEY, WEIGHTS_NAME
from artifacts.manifest import PEFT_FORMATS
from artifacts.public_names import public_config, public_metadata
from artifacts.rank_cut import config_text, rank_cut
from artifacts.safetensors_header import MAX_HEADER_BYTES, SafetensorsHeader, packed_header, parse_header
from artifacts.served_ranks import check_rank
from storage import made_models
from storage.adapters import manifest_of
from storage.blobs import BlobStore
from storage.checksums import Crc32Cache
from storage.database import Database
from storage.segments import BlobPieces, BlobSlice, MadeBytes, Segment, read_segments, total_size
from storage.tables import AdapterFileRow, AdapterRow
from storage.zip_layout import ZipEntry, blob_entry, bytes_entry, lay_out_zip

ZIP_TYPE = "application/zip"
SAFETENSORS_TYPE = "application/octet-stream"

DownloadFormat = Literal["peft", "safetensors", "diffusers", "kohya", "comfy", "gguf"]
DownloadDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Download:
    """A file that can be sent: its parts, ETag (quoted), media type, a name for the client's disk, and more headers.

    `members` are the entries of an archive; none for any other file.
    """

    segments: tuple[Segment, ...]
    etag: str
    media_type: str
    file_name: str
    headers: Mapping[str, str] = field(default_factory=dict)
    members: tuple[ZipEntry, ...] = ()

    @property
    def size(self) -> int:
        """Bytes."""
        return total_size(self.segments)


def peft_download(blobs: BlobStore, crc32: Crc32Cache, row: AdapterRow) -> Download:
    """The zip of a PEFT directory.

    Raises:
        BlobMissing: the store has lost a file.
        RequestInvalid: the adapter consists of several components, which one PEFT directory can not hold.
    """
    check_blobs(blobs, row.files)
    weights = weights_of(row)
    config = config_of(row)
    if any(file.path == CONFIG_NAME for file in row.files):
        entries = [
            blob_entry(file.path, file.sha256, file.size, crc32.get(file.sha256))
            if file.path != CONFIG_NAME or config is row.config
            else bytes_entry(CONFIG_NAME, config_text(config))
            for file in directory_files(row)
        ]
    else:
        check_one_component(row)
        entries = [
            bytes_entry(CONFIG_NAME, config_text(config)),
            blob_entry(WEIGHTS_NAME, weights.sha256, weights.size, crc32.get(weights.sha256)),
        ]
    return zipped(entries, file_stem(row))


def check_one_component(row: AdapterRow) -> None:
    """Raises RequestInvalid: the adapter consists of several components, which one PEFT directory can not hold."""
    if "r" not in row.config and "peft_type" not in row.config:
        raise RequestInvalid(
            f"{row.id} holds the adapters of several components; a PEFT directory holds one.",
            hint="Download it with format=safetensors.",
            errors=[FieldError("/query/format", "must be safetensors for this adapter")],
        )


def safetensors_download(blobs: BlobStore, row: AdapterRow) -> Download:
    """One safetensors file with the configuration in its metadata; the stored file itself if it is one, or if it is in
    a format of its own, unless the configuration in it names a folder as its base model.

    Raises:
        BlobMissing: the store has lost the file.
        FileBroken: the stored header can not be read.
    """
    weights = weights_of(row)
    check_blobs(blobs, [weights])
    header, raw = stored_header(blobs, weights)
    file_name = f"{file_stem(row)}.safetensors"
    metadata = public_metadata(header.metadata, row.base_model)
    if METADATA_KEY not in metadata and row.format in PEFT_FORMATS:
        metadata = {
            **metadata,
            "format": metadata.get("format", "pt"),
            METADATA_KEY: json.dumps(config_of(row), sort_keys=True),
        }
    if metadata is header.metadata:
        whole = BlobSlice(weights.sha256, 0, weights.size)
        return Download((whole,), f'"{weights.sha256}"', SAFETENSORS_TYPE, file_name)
    document: dict[str, Any] = json.loads(raw)
    document["__metadata__"] = dict(metadata)
    segments = (packed_header(document), BlobSlice(weights.sha256, header.data_start, weights.size))
    return Download(segments, etag_of("safetensors", segments), SAFETENSORS_TYPE, file_name)


def cut_download(blobs: BlobStore, crc32: Crc32Cache, row: AdapterRow, rank: int, layout: DownloadFormat) -> Download:
    """The adapter of a smaller rank inside one that was trained for that, as `peft_download` or `safetensors_download`
    give the whole: the trained numbers as they are, with a configuration for that rank.

    Raises:
        RequestInvalid: the adapter was not trained for that rank.
        BlobMissing, FileBroken: as there.
    """
    manifest = manifest_of(row)
    nested = check_rank(manifest.report.nested, rank, "/query/rank")
    weights = weights_of(row)
    check_blobs(blobs, row.files)
    header, _ = stored_header(blobs, weights)
    cut = rank_cut(header, config_of(row), manifest.modules, nested, rank, with_config=layout == "safetensors")
    content = (cut.head, BlobPieces(weights.sha256, cut.pieces))
    etag, name = etag_of("safetensors", content), f"{file_stem(row)}-rank-{rank}"
    if layout == "safetensors":
        return Download(content, etag, SAFETENSORS_TYPE, f"{name}.safetensors")
    size = total_size(content)
    sum_of_weights = crc32.made(etag.strip('"'), lambda: read_segments(blobs, content, 0, size))
    others = [file for file in directory_files(row) if file.path not in (CONFIG_NAME, weights.path)]
    entries = [blob_entry(file.path, file.sha256, file.size, crc32.get(file.sha256)) for file in others]
    entries.append(bytes_entry(CONFIG_NAME, config_text(cut.config)))
    entries.append(ZipEntry(WEIGHTS_NAME, sum_of_weights, size, content))
    return zipped(entries, name)


def serves_ranks(row: AdapterRow) -> bool:
    """Whether the adapter was trained for several ranks."""
    return manifest_of(row).report.nested is not None


def zipped(entries: list[ZipEntry], name: str) -> Download:
    """The archive of these entries, in the order of their names."""
    ordered = sorted(entries, key=lambda entry: entry.name)
    segments = lay_out_zip(ordered)
    return Download(segments, etag_of("zip", segments), ZIP_TYPE, f"{name}.zip", members=tuple(ordered))


def config_of(row: AdapterRow) -> Mapping[str, Any]:
    """The adapter's configuration as it is handed out; the stored one, unless that names a folder as its base model."""
    return public_config(row.config, row.base_model)


def stored_header(blobs: BlobStore, weights: AdapterFileRow) -> tuple[SafetensorsHeader, bytes]:
    """The header of a stored file, and its JSON as it stands there."""
    start = b"".join(blobs.stream(weights.sha256, 0, min(8, weights.size)))
    length = int.from_bytes(start, "little")
    raw = b"".join(blobs.stream(weights.sha256, 8, 8 + min(length, MAX_HEADER_BYTES)))
    return parse_header(io.BytesIO(start + raw), weights.size, name=weights.path), raw


def weights_of(row: AdapterRow) -> AdapterFileRow:
    """The file with the factors. Raises BlobMissing: there is none on record."""
    for file in row.files:
        if file.path.endswith(".safetensors"):
            return file
    raise BlobMissing(f"{row.id} has no weights on record.")


def directory_files(row: AdapterRow) -> list[AdapterFileRow]:
    """The files of a PEFT directory: without config.json of the base model, by which transformers would take the
    directory for a model's."""
    return [file for file in row.files if file.path != BASE_CONFIG]


def check_blobs(blobs: BlobStore, files: Sequence[AdapterFileRow]) -> None:
    """Find a missing blob before the status line is out."""
    for file in files:
        if not blobs.exists(file.sha256):
            raise BlobMissing(
                f"The bytes of {file.path} (sha256 {file.sha256}) are missing from the blob store.",
                hint="Restore them from a backup, or upload the adapter again.",
            )


def etag_of(kind: str, segments: Sequence[Segment]) -> str:
    """A strong ETag of what the segments say, without reading a blob."""
    digest = hashlib.sha256(kind.encode())
    for segment in segments:
        if isinstance(segment, bytes):
            digest.update(b"\0" + hashlib.sha256(segment).digest())
        elif isinstance(segment, BlobPieces):
            digest.update(f"\2{segment.sha256}:{segment.pieces.runs}".encode())
        elif isinstance(segment, MadeBytes):
            digest.update(f"\3{segment.size}".encode())  # what it is made of stands in the bytes before it
        else:
            digest.update(f"\1{segment.sha256}:{segment.start}:{segment.stop}".encode())
    return f'"{digest.hexdigest()}"'


def file_stem(row: AdapterRow) -> str:
    """A file name that every system takes."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", row.name).strip("-.")[:80]
    return stem or row.id


def model_file(database: Database, blobs: BlobStore, model_id: str, name: str) -> Download:
    """A file of a model that a job made.

    Raises:
        NotFound: there is no such model or file.
        BlobMissing: the store has lost it.
    """
    with database.read() as session:
        row = made_models.get_file(session, model_id, name)
    if not blobs.exists(row.sha256):
        raise BlobMissing(
            f"The bytes of {row.path} of the model {row.model_id} (sha256 {row.sha256}) are missing.",
            hint="Restore them from a backup, or merge again from its recipe.",
        )
    return Download((BlobSlice(row.sha256, 0, row.size),), f'"{row.sha256}"', row.media_type, row.path)
