"""An adapter as a file in whatever format, dtype and rank it is asked for: the stored bytes where they will do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from artifacts.manifest import PEFT_FORMATS
from storage.base_configs import BaseConfigs
from storage.blobs import BlobStore
from storage.checksums import Crc32Cache
from storage.downloads import Download, cut_download, peft_download, safetensors_download, serves_ranks
from storage.measures import Measures
from storage.tables import AdapterRow
from storage.written_downloads import Wish, written_download


@dataclass(frozen=True, slots=True)
class AdapterDownloads:
    """Lays them out; nothing is computed before it is read, but what decides whether it can be had."""

    blobs: BlobStore
    crc32: Crc32Cache
    measures: Measures
    configs: BaseConfigs

    def of(self, row: AdapterRow, wish: Wish) -> Download:
        """The adapter as `wish` says, whose `base_config` is looked up here.

        Raises:
            RequestInvalid: the format, dtype or rank can not hold it.
            BlobMissing, FileBroken: its stored files are not there, or not what they were.
        """
        blobs, layout = self.blobs, wish.layout
        as_stored = wish.dtype is None and row.format in PEFT_FORMATS
        if layout == "safetensors" and wish.dtype is None and wish.rank is None:
            return safetensors_download(blobs, row)
        if layout == "peft" and as_stored and wish.rank is None:
            return peft_download(blobs, self.crc32, row)
        if layout in ("peft", "safetensors") and as_stored and wish.rank is not None and serves_ranks(row):
            return cut_download(blobs, self.crc32, row, wish.rank, layout)
        config = self.configs.of_adapter(row) if layout == "gguf" else None
        return written_download(blobs, self.crc32, self.measures, row, replace(wish, base_config=config))
