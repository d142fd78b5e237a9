"""The SQL tables, the same on SQLite and PostgreSQL. Times are UTC with microseconds; ids are prefixed UUIDv7."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import Mapped, mapped_column, relationship

from storage.alias_tables import AliasRow, AliasSwitchRow
from storage.api_key_tables import ApiKeyRow
from storage.automation_tables import (
    DomainEventRow,
    FiringItemRow,
    FiringRow,
    ScheduleRow,
    WebhookDeliveryRow,
    WebhookRow,
)
from storage.columns import Base, partial_index
from storage.image_tables import ImageFileRow, ImageRow, JobPreviewRow
from storage.key_tables import AdapterKeysRow
from storage.model_tables import AdapterWaiverRow, MadeModelRow, ModelFileRow, ModelRow
from storage.training_tables import ClientUpdateRow, JobCheckpointRow, JobMetricRow
from storage.transfer_tables import HeldFileRow, SealedInputRow, TransferableFileRow, TransferableRow, TransferRow
from storage.upload_tables import UploadRow, UploadSegmentRow

__all__ = [
    "ANONYMOUS",
    "JOB_STATES",
    "TERMINAL_STATES",
    "AdapterFileRow",
    "AdapterKeysRow",
    "AdapterRow",
    "AdapterTagRow",
    "AdapterWaiverRow",
    "AliasRow",
    "AliasSwitchRow",
    "ApiKeyRow",
    "Base",
    "BlobRow",
    "ClientUpdateRow",
    "DatasetRow",
    "DomainEventRow",
    "FiringItemRow",
    "FiringRow",
    "HeldFileRow",
    "IdempotencyRow",
    "ImageFileRow",
    "ImageRow",
    "JobAttemptRow",
    "JobCheckpointRow",
    "JobEventRow",
    "JobLogRow",
    "JobMetricRow",
    "JobPreviewRow",
    "JobQueueRow",
    "JobRow",
    "LineageRow",
    "MadeModelRow",
    "ModelFileRow",
    "ModelRow",
    "ScheduleRow",
    "SealedInputRow",
    "ServerRow",
    "TransferRow",
    "TransferableFileRow",
    "TransferableRow",
    "UploadRow",
    "UploadSegmentRow",
    "WebhookDeliveryRow",
    "WebhookRow",
]

ANONYMOUS = "anonymous"
"""The owner of what was asked for without an API key."""


class BlobRow(Base):
    """A blob that the store holds. The row outlives its last use until the sweep removes both."""

    __tablename__ = "blobs"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]  # when it was last reserved
    reservations: Mapped[int] = mapped_column(Integer, server_default="0")  # that were not ended; see blob_rows


def _live_index(name: str, *columns: str) -> Index:
    return partial_index(name, *columns, "deleted_at", where="deleted_at IS NULL")


class AdapterRow(Base):
    """An immutable adapter. Deleting sets `deleted_at`; only a live row blocks a second upload of the same content."""

    __tablename__ = "adapters"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    name_folded: Mapped[str] = mapped_column(Text)  # case-folded here, since the databases fold differently
    description: Mapped[str] = mapped_column(Text, default="")
    tags: Mapped[list[str]]
    format: Mapped[str] = mapped_column(String(40))
    method: Mapped[str] = mapped_column(String(40))
    base_model: Mapped[str | None] = mapped_column(String(300))  # as the uploader or the file names it
    base_model_revision: Mapped[str | None] = mapped_column(String(64))
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"))
    rank: Mapped[int] = mapped_column(Integer)
    alpha: Mapped[float] = mapped_column(Float)
    target_modules: Mapped[list[str]]
    module_count: Mapped[int] = mapped_column(Integer)
    parameter_count: Mapped[int] = mapped_column(BigInteger)
    dtype: Mapped[str] = mapped_column(String(16))
    size: Mapped[int] = mapped_column(BigInteger)
    mergeable: Mapped[bool] = mapped_column(Boolean)
    refusal: Mapped[str | None] = mapped_column(Text)
    weights_digest: Mapped[str] = mapped_column(String(64))
    identity_digest: Mapped[str] = mapped_column(String(64))
    config: Mapped[dict[str, Any]]
    modules: Mapped[list[Any]]  # LoraModule as dicts
    report: Mapped[dict[str, Any]]  # IntakeReport as a dict
    origin: Mapped[str] = mapped_column(String(16))  # "upload" | kind of the job that made it
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    source: Mapped[dict[str, Any] | None]  # where an imported one was fetched from
    created_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]

    files: Mapped[list[AdapterFileRow]] = relationship(order_by="AdapterFileRow.path", lazy="selectin")

    @property
    def ranks(self) -> list[int]:
        """At which ranks the adapter can be cut; none if it was not trained for that."""
        return list(self.report.get("nested", {}).get("ranks", ()))

    __table_args__ = (
        partial_index("uq_adapters_live_identity", "identity_digest", where="deleted_at IS NULL", unique=True),
        # The first columns are a filter and the order of the list. The others are what is looked at on the way, so that
        # the table, whose rows are large, is not; SQLite wants the column of the condition among them.
        _live_index("ix_adapters_created", "created_at", "id", "name_folded"),
        _live_index("ix_adapters_base_model", "base_model", "created_at", "id", "method", "name_folded"),
        _live_index("ix_adapters_model_id", "model_id", "created_at", "id", "method", "name_folded"),
        _live_index("ix_adapters_method", "method", "created_at", "id", "base_model", "model_id", "name_folded"),
        _live_index("ix_adapters_weights_digest", "weights_digest", "created_at", "id"),
    )


class AdapterTagRow(Base):
    """A tag of a live adapter. The other columns are the adapter's and never change.

    One index gives the newest of a tag, with all that they are filtered by besides; a digest stands for the base model,
    since an entry of an index has to be short.
    """

    __tablename__ = "adapter_tags"

    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    tag: Mapped[str] = mapped_column(String(200), primary_key=True)
    created_at: Mapped[datetime]
    base_model_digest: Mapped[str | None] = mapped_column(String(32))
    model_id: Mapped[str | None] = mapped_column(String(48))
    method: Mapped[str] = mapped_column(String(40))
    name_folded: Mapped[str] = mapped_column(Text)

    __table_args__ = (
        Index(
            "ix_adapter_tags_tag",
            *("tag", "created_at", "adapter_id", "base_model_digest", "model_id", "method", "name_folded"),
        ),
    )


class AdapterFileRow(Base):
    __tablename__ = "adapter_files"

    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    path: Mapped[str] = mapped_column(String(300), primary_key=True)
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"))
    size: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(100))
    created_at: Mapped[datetime]  # of the adapter: one index gives the newest that have a file

    __table_args__ = (Index("ix_adapter_files_content", "sha256", "created_at", "adapter_id"),)


class LineageRow(Base):
    """An edge: `child` was made from `parent` by a job, with the exact recipe and library versions."""

    __tablename__ = "lineage"

    child_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    parent_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), primary_key=True, index=True)
    position: Mapped[int] = mapped_column(Integer)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    recipe: Mapped[dict[str, Any]]


class DatasetRow(Base):
    """An immutable dataset: one file of rows, all of which were valid. As of adapters, a live one is there once."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    name_folded: Mapped[str] = mapped_column(Text)
    format: Mapped[str] = mapped_column(String(16))  # "jsonl" | "csv" | "parquet" | "images"
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"))
    size: Mapped[int] = mapped_column(BigInteger)  # bytes of the file as it was sent
    rows: Mapped[int] = mapped_column(BigInteger)
    columns: Mapped[list[Any]]  # [{name, type, nulls, kinds}]
    tasks: Mapped[list[Any]]  # [{task, form, columns, usable, reason}]
    warnings: Mapped[list[str]]
    created_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]

    __table_args__ = (
        partial_index("uq_datasets_live_content", "sha256", "format", where="deleted_at IS NULL", unique=True),
        Index("ix_datasets_sha256", "sha256"),  # the sweep asks of each blob whether a dataset, deleted or not, has it
        _live_index("ix_datasets_created", "created_at", "id", "name_folded"),
    )


JOB_STATES = ("queued", "running", "cancelling", "succeeded", "failed", "cancelled")
TERMINAL_STATES = ("succeeded", "failed", "cancelled")


class JobRow(Base):
    """A job. `attempt` is the fencing token: a write of an attempt counts only while it is the current one."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    kind: Mapped[str] = mapped_column(String(24))
    owner: Mapped[str] = mapped_column(String(48), default=ANONYMOUS)  # API key id: claims are fair between owners
    devices: Mapped[int] = mapped_column(Integer, default=1)  # device slots that it needs, all of one host
    affinity: Mapped[str | None] = mapped_column(String(64))  # the base model that it loads: its models.id
    params: Mapped[dict[str, Any]]
    resources: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(12))
    precedence: Mapped[int] = mapped_column(Integer, default=0)  # lowest first; minus what users call priority
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    failures: Mapped[int] = mapped_column(Integer, default=0)  # infrastructure failures so far
    restarts: Mapped[int] = mapped_column(Integer, default=0)  # servers that died while they ran it
    available_at: Mapped[datetime]  # not claimed before: back-off
    cancel_requested: Mapped[bool] = mapped_column(Boolean, default=False)
    server_id: Mapped[str | None] = mapped_column(String(48))
    boot_id: Mapped[str | None] = mapped_column(String(48))
    slot: Mapped[str | None] = mapped_column(String(40))
    lease_expires_at: Mapped[datetime | None]
    held_by: Mapped[str | None] = mapped_column(String(48))  # the server that keeps slots free for it
    held_until: Mapped[datetime | None]
    fraction: Mapped[float] = mapped_column(Float, default=0.0)
    step: Mapped[int | None] = mapped_column(Integer)
    total: Mapped[int | None] = mapped_column(Integer)
    message: Mapped[str] = mapped_column(String(500), default="")
    last_event: Mapped[int] = mapped_column(Integer, default=0)  # sequence number of the newest event
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    retry_of: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    schedule_id: Mapped[str | None] = mapped_column(ForeignKey("schedules.id"))
    created_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    request_id: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    @property
    def priority(self) -> int:
        """Of the jobs of one owner, the highest is served first."""
        return -self.precedence

    __table_args__ = (
        CheckConstraint(f"state IN {JOB_STATES!r}", name="state"),
        partial_index("ix_jobs_queue", "owner", "devices", "precedence", "created_at", "id", where="state = 'queued'"),
        partial_index("ix_jobs_active", "server_id", "lease_expires_at", where="state IN ('running', 'cancelling')"),
        Index("ix_jobs_created", "created_at", "id"),
        Index("ix_jobs_kind", "kind", "created_at", "id"),
        Index("ix_jobs_state", "state", "created_at", "id"),
        Index("ix_jobs_kind_state", "kind", "state", "created_at", "id"),
        partial_index(
            "ix_jobs_schedule",
            "schedule_id",
            "created_at",
            "id",
            where="schedule_id IS NOT NULL AND state IN ('queued', 'running', 'cancelling')",
        ),
    )


class JobQueueRow(Base):
    """How many jobs of one owner and size wait and run: kept by every change of state, so that nobody has to count.

    `served_at` is when one of them was last claimed.
    """

    __tablename__ = "job_queues"

    owner: Mapped[str] = mapped_column(String(48), primary_key=True)
    devices: Mapped[int] = mapped_column(Integer, primary_key=True)
    queued: Mapped[int] = mapped_column(Integer, default=0)
    running: Mapped[int] = mapped_column(Integer, default=0)  # also those being cancelled
    served_at: Mapped[datetime | None]


class JobEventRow(Base):
    """What happened to a job, in order: the source of the server-sent events."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True)
    type: Mapped[str] = mapped_column(String(24))  # "state" | "progress" | "preview" | "warning"
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class JobAttemptRow(Base):
    """One attempt: where it ran and how it ended."""

    __tablename__ = "job_attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True)
    server_id: Mapped[str] = mapped_column(String(48))
    slot: Mapped[str] = mapped_column(String(40))
    pid: Mapped[int | None] = mapped_column(Integer)
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(String(24))  # … "failed" | "cancelled" | "lost" | "paused"
    exit: Mapped[dict[str, Any] | None]  # {code, signal, peak_memory}
    log_sha256: Mapped[str | None] = mapped_column(String(64))


class JobLogRow(Base):
    """A piece of the log of an attempt that runs; the whole is in the blob store once it has ended."""

    __tablename__ = "job_logs"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True)
    text: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime]


class ServerRow(Base):
    """A supervisor: who it is now (`boot_id`), what slots it has and when it last gave a sign of life."""

    __tablename__ = "servers"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    boot_id: Mapped[str] = mapped_column(String(48))
    host: Mapped[str] = mapped_column(String(300))
    pool: Mapped[str] = mapped_column(String(16), default="local")  # the provider of its workers
    slots: Mapped[list[Any]]  # [{name, device, host, state, pid, job_id, attempt, warm}]
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]


class IdempotencyRow(Base):
    """The answer to a POST under a key; `status` is null while the first request still runs."""

    __tablename__ = "idempotency_keys"

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)
    owner: Mapped[str] = mapped_column(String(48))  # API key id, or "anonymous"
    key: Mapped[str] = mapped_column(String(255))
    request_digest: Mapped[str] = mapped_column(String(64))
    status: Mapped[int | None] = mapped_column(Integer)
    headers: Mapped[dict[str, Any] | None]
    body: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime]

    __table_args__ = (UniqueConstraint("owner", "key"),)
