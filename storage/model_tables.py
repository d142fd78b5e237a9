"""The tables of base models, and of the adapters that may go with theirs."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from storage.columns import Base


class ModelRow(Base):
    """A registered base model. Two registrations of one location at one revision with the same weights are one."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    name: Mapped[str] = mapped_column(String(300), unique=True)
    identity_digest: Mapped[str] = mapped_column(String(64), unique=True)  # of source, location, revision, weights
    source: Mapped[str] = mapped_column(String(16))  # "hub" | "path" | "files"
    location: Mapped[str] = mapped_column(Text)  # hub id, absolute path, or digest of the weights
    revision: Mapped[str | None] = mapped_column(String(64))
    architecture: Mapped[str | None] = mapped_column(String(200))
    pipeline: Mapped[str | None] = mapped_column(String(200))  # class of a diffusers pipeline
    weights_digest: Mapped[str | None] = mapped_column(String(64))
    tokenizer_digest: Mapped[str | None] = mapped_column(String(64))
    fingerprint: Mapped[list[Any] | None]  # [[module path, d_out, d_in], …] sorted
    fingerprint_digest: Mapped[str | None] = mapped_column(String(64))
    quantisation: Mapped[dict[str, Any] | None]  # quantization_config of its configuration
    parameter_count: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime]
    deprecated_at: Mapped[datetime | None]  # may lie ahead
    deprecation_told_at: Mapped[datetime | None]  # when that date had come and its event was published
    remove_at: Mapped[datetime | None]  # when it is to be removed, if nothing depends on it then
    removed_at: Mapped[datetime | None]
    successor_id: Mapped[str | None] = mapped_column(String(48))  # the model to use instead
    deprecation_reason: Mapped[str | None] = mapped_column(Text)


class MadeModelRow(Base):
    """What a job made of a base model: a model whose files are in the blob store."""

    __tablename__ = "made_models"

    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    recipe: Mapped[dict[str, Any]]  # what makes it again: the base model, the adapters, the method
    size: Mapped[int] = mapped_column(BigInteger)  # bytes of all its files
    created_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))

    files: Mapped[list[ModelFileRow]] = relationship(order_by="ModelFileRow.path", lazy="selectin")


class ModelFileRow(Base):
    """One file of a model that a job made."""

    __tablename__ = "model_files"

    model_id: Mapped[str] = mapped_column(ForeignKey("made_models.model_id"), primary_key=True)
    path: Mapped[str] = mapped_column(String(200), primary_key=True)
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"))
    size: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(100))

    __table_args__ = (Index("ix_model_files_sha256", "sha256"),)


class AdapterWaiverRow(Base):
    """Somebody has accepted that an adapter goes out of use with its base model."""

    __tablename__ = "adapter_waivers"

    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    reason: Mapped[str] = mapped_column(Text)
    created_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    created_at: Mapped[datetime]
