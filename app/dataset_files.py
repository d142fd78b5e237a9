"""The file of a dataset: some of its rows, or all of it to download."""

from __future__ import annotations

import re
from typing import cast

from app.schemas.datasets import MAX_OFFSET, DatasetRows, NumberedRow
from artifacts.errors import BlobMissing
from storage.blob_reader import open_blob
from storage.blobs import BlobStore
from storage.downloads import Download
from storage.segments import BlobSlice
from storage.tables import DatasetRow
from train.rows import Format, canonical, iter_stored
from train.text_lines import GZIP_MAGIC

PREVIEW_BYTES = 4 * 1024**2
GZIP_TYPE = "application/gzip"
MEDIA_TYPES = {
    "jsonl": "application/jsonl",
    "csv": "text/csv",
    "parquet": "application/vnd.apache.parquet",
    "images": "application/zip",
    "fasta": "text/x-fasta",
}
_ENDINGS = {"images": "zip"}


def preview(blobs: BlobStore, row: DatasetRow, offset: int, limit: int) -> DatasetRows:
    """At most `limit` rows behind the first `offset`, and no more than about 4 MiB of them.

    Raises:
        BlobMissing, BlobStoreUnavailable, FileBroken: the stored file can not be read.
    """
    items: list[NumberedRow] = []
    size = 0
    with open_blob(blobs, row.sha256) as file:
        for number, values in iter_stored(file, cast("Format", row.format), skip=offset):
            size += len(canonical(values))
            if len(items) == limit or (items and size > PREVIEW_BYTES):
                break
            items.append(NumberedRow(row=number, values=values))
    following = offset + len(items)
    shown = bool(items) and following < row.rows and following <= MAX_OFFSET
    return DatasetRows(items=items, total=row.rows, next=following if shown else None)


def download(blobs: BlobStore, row: DatasetRow) -> Download:
    """The file as it was sent.

    Raises:
        BlobMissing: the store has lost it.
    """
    if not blobs.exists(row.sha256):
        raise BlobMissing(
            f"The bytes of the dataset {row.id} (sha256 {row.sha256}) are missing from the blob store.",
            hint="Restore them from a backup, or upload the dataset again.",
        )
    packed = b"".join(blobs.stream(row.sha256, 0, min(2, row.size))) == GZIP_MAGIC
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", row.name).strip("-.")[:80] or row.id
    return Download(
        (BlobSlice(row.sha256, 0, row.size),),
        f'"{row.sha256}"',
        GZIP_TYPE if packed else MEDIA_TYPES[row.format],
        f"{name}.{_ENDINGS.get(row.format, row.format)}{'.gz' if packed else ''}",
    )
