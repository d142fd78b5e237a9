"""The SQL tables, the same on SQLite and PostgreSQL. Times are UTC with microseconds; ids are prefixed UUIDv7."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime on every database; SQLite drops the zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a naive datetime can not be stored")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {dict[str, Any]: Json, list[str]: Json, list[Any]: Json, datetime: UtcDateTime}  # noqa: RUF012


class ApiKeyRow(Base):
    """A key is 32 random bytes; only its SHA-256 is kept, which needs no slow hash at that entropy."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    prefix: Mapped[str] = mapped_column(String(16), unique=True)
    sha256: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class BlobRow(Base):
    """A blob that the store holds. The row outlives its last use until the sweep removes both."""

    __tablename__ = "blobs"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class ModelRow(Base):
    """A registered base model. Two registrations of one location at one revision with the same weights are one."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    name: Mapped[str] = mapped_column(String(300), unique=True)
    identity_digest: Mapped[str] = mapped_column(String(64), unique=True)  # of source, location, revision, weights
    source: Mapped[str] = mapped_column(String(16))  # "hub" | "path"
    location: Mapped[str] = mapped_column(Text)  # hub id, or absolute path
    revision: Mapped[str | None] = mapped_column(String(64))
    architecture: Mapped[str | None] = mapped_column(String(200))
    weights_digest: Mapped[str | None] = mapped_column(String(64))
    tokenizer_digest: Mapped[str | None] = mapped_column(String(64))
    fingerprint: Mapped[list[Any] | None]  # [[module path, d_out, d_in], …] sorted
    fingerprint_digest: Mapped[str | None] = mapped_column(String(64))
    parameter_count: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime]
    deprecated_at: Mapped[datetime | None]
    removed_at: Mapped[datetime | None]


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
    weights_digest: Mapped[str] = mapped_column(String(64), index=True)
    identity_digest: Mapped[str] = mapped_column(String(64))
    config: Mapped[dict[str, Any]]
    modules: Mapped[list[Any]]  # LoraModule as dicts
    report: Mapped[dict[str, Any]]  # IntakeReport as a dict
    origin: Mapped[str] = mapped_column(String(16))  # "upload" | kind of the job that made it
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    created_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]

    files: Mapped[list[AdapterFileRow]] = relationship(order_by="AdapterFileRow.path", lazy="selectin")

    __table_args__ = (
        Index(
            "uq_adapters_live_identity",
            "identity_digest",
            unique=True,
            sqlite_where=text("deleted_at IS NULL"),
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index("ix_adapters_created", "created_at", "id"),
    )


class AdapterFileRow(Base):
    __tablename__ = "adapter_files"

    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    path: Mapped[str] = mapped_column(String(300), primary_key=True)
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)
    size: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(100))


class LineageRow(Base):
    """An edge: `child` was made from `parent` by a job, with the exact recipe and library versions."""

    __tablename__ = "lineage"

    child_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    parent_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), primary_key=True, index=True)
    position: Mapped[int] = mapped_column(Integer)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    recipe: Mapped[dict[str, Any]]


class DatasetRow(Base):
    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    format: Mapped[str] = mapped_column(String(16))
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"))
    size: Mapped[int] = mapped_column(BigInteger)
    rows: Mapped[int] = mapped_column(BigInteger)
    columns: Mapped[list[Any]]
    created_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]


JOB_STATES = ("queued", "running", "cancelling", "succeeded", "failed", "cancelled")
TERMINAL_STATES = ("succeeded", "failed", "cancelled")


class JobRow(Base):
    """A job. `attempt` is the fencing token: a write of an attempt counts only while it is the current one."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    kind: Mapped[str] = mapped_column(String(24))
    params: Mapped[dict[str, Any]]
    resources: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(12))
    priority: Mapped[int] = mapped_column(Integer, default=0)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    failures: Mapped[int] = mapped_column(Integer, default=0)  # infrastructure failures so far
    available_at: Mapped[datetime]  # not claimed before: back-off
    cancel_requested: Mapped[bool] = mapped_column(Boolean, default=False)
    server_id: Mapped[str | None] = mapped_column(String(48))
    boot_id: Mapped[str | None] = mapped_column(String(48))
    slot: Mapped[str | None] = mapped_column(String(40))
    lease_expires_at: Mapped[datetime | None]
    fraction: Mapped[float] = mapped_column(Float, default=0.0)
    step: Mapped[int | None] = mapped_column(Integer)
    total: Mapped[int | None] = mapped_column(Integer)
    message: Mapped[str] = mapped_column(String(500), default="")
    last_event: Mapped[int] = mapped_column(Integer, default=0)  # sequence number of the newest event
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    retry_of: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    created_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    request_id: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(f"state IN {JOB_STATES!r}", name="state"),
        Index("ix_jobs_claim", "state", "priority", "created_at", "id"),
        Index("ix_jobs_created", "created_at", "id"),
    )


class JobEventRow(Base):
    """What happened to a job, in order: the source of the server-sent events."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True)
    type: Mapped[str] = mapped_column(String(24))  # "state" | "progress" | "warning"
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
    outcome: Mapped[str | None] = mapped_column(String(24))  # "succeeded" | "failed" | "cancelled" | "lost"
    exit: Mapped[dict[str, Any] | None]  # {code, signal, peak_memory}
    log_sha256: Mapped[str | None] = mapped_column(String(64))


class ServerRow(Base):
    """A supervisor: who it is now (`boot_id`), what slots it has and when it last gave a sign of life."""

    __tablename__ = "servers"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    boot_id: Mapped[str] = mapped_column(String(48))
    host: Mapped[str] = mapped_column(String(300))
    slots: Mapped[list[Any]]  # [{name, device, pid, job_id, attempt, warm}]
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
