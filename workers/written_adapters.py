"""A stored adapter as files on disk, in the format that whoever reads them wants."""

from __future__ import annotations

from pathlib import Path

from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME
from storage.adapter_downloads import AdapterDownloads
from storage.base_configs import BaseConfigs
from storage.checksums import Crc32Cache
from storage.downloads import Download
from storage.measures import Measures
from storage.segments import Segment, read_segments, total_size
from workers.context import JobContext

_READ = (CONFIG_NAME, WEIGHTS_NAME)
"""What programs read of a PEFT directory."""


def downloads_of(context: JobContext) -> AdapterDownloads:
    """What lays adapters out, for a job."""
    return AdapterDownloads(
        context.blobs,
        Crc32Cache(context.blobs, context.scratch / "crc32"),
        Measures(),
        BaseConfigs(context.database, context.blobs, context.spec.model_roots),
    )


def write_adapter(context: JobContext, download: Download, folder: Path) -> Path:
    """The download in the new `folder`; gives what a loader is to be given.

    Returns:
        The folder, with configuration and weights of a PEFT directory; else the one safetensors file.

    Raises:
        BlobMissing, BlobCorrupt, BlobStoreUnavailable: the stored bytes can not be had.
        AttemptCancelled
    """
    folder.mkdir(parents=True)
    members = [(item.name, item.content) for item in download.members if item.name in _READ]
    for name, content in members:
        _write(context, folder / name, content)
    if members:
        return folder
    path = folder / "adapter.safetensors"
    _write(context, path, download.segments)
    return path


def _write(context: JobContext, path: Path, content: tuple[Segment, ...]) -> None:
    with path.open("wb") as file:
        for chunk in read_segments(context.blobs, content, 0, total_size(content)):
            context.check_cancelled()
            file.write(chunk)
