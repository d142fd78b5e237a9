"""What the handlers share: made once by the application factory, found again on `app.state`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from anyio import CapacityLimiter

from app.key_uses import KeyUses
from app.metrics import Metrics
from app.settings import Settings
from storage.adapter_downloads import AdapterDownloads
from storage.base_configs import BaseConfigs
from storage.blobs import BlobStore
from storage.checksums import Crc32Cache
from storage.database import Database
from storage.measures import Measures
from workers.clockwork import Clockwork
from workers.supervisor import Supervisor

INTAKES_AT_ONCE = 4
"""Uploads that are unpacked and inspected at the same time; the others wait with all their bytes on disk."""


PREVIEWS_AT_ONCE = 4
"""Looks into datasets at the same time: of a Parquet file each may take as much memory as a row group does."""


@dataclass(slots=True)
class Services:
    """The parts of a running server. `supervisor` is None while the pool is off or not yet started.

    `clockwork` is None before the start and after the end.
    """

    settings: Settings
    database: Database
    blobs: BlobStore
    metrics: Metrics = field(default_factory=Metrics)
    key_uses: KeyUses = field(default_factory=KeyUses)
    supervisor: Supervisor | None = None
    clockwork: Clockwork | None = None
    intake_limiter: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(INTAKES_AT_ONCE))
    preview_limiter: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(PREVIEWS_AT_ONCE))
    measures: Measures = field(default_factory=Measures)
    crc32: Crc32Cache = field(init=False)

    def __post_init__(self) -> None:
        self.crc32 = Crc32Cache(self.blobs, self.settings.cache_dir / "crc32")

    @property
    def base_configs(self) -> BaseConfigs:
        """Reads config.json of base models."""
        return BaseConfigs(self.database, self.blobs, self.settings.model_roots)

    @property
    def adapter_downloads(self) -> AdapterDownloads:
        """Lays adapters out as files."""
        return AdapterDownloads(self.blobs, self.crc32, self.measures, self.base_configs)

    @property
    def staging(self) -> Path:
        """Where uploads are staged: on the blob store's file system when it has one, so that storing is a link."""
        return self.blobs.staging_dir or self.settings.staging_root

    def wake_pool(self) -> None:
        """Tell the pool of this server that there is work; without one, the others find it when they next look."""
        if self.supervisor is not None:
            self.supervisor.wake()

    def job_made(self, kind: str) -> None:
        """Count a job that was accepted here, and tell the pool."""
        self.metrics.jobs_submitted.labels(kind).inc()
        self.wake_pool()
