"""The tables of transfers: what an adapter keeps of its training, inputs that only a worker reads, and the transfers
themselves, each with what waits for a decision.

Everything in the first three tables is as confidential as the training data: no answer, event, log line or metric has
any of it but the names, counts and digests that are said to be public.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Boolean, Float, ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from storage.columns import Base, partial_index


class TransferableRow(Base):
    """What is left of an adapter's training data: seeds that its owner approved, and the discriminator's settings."""

    __tablename__ = "transferables"

    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    seeds: Mapped[list[str]]
    task: Mapped[str] = mapped_column(String(200))  # its short human name, as the discriminator's question has it
    prompt_format: Mapped[dict[str, Any]]  # transfer.prompts.PromptFormat
    size: Mapped[int] = mapped_column(BigInteger)  # inputs of the training data
    recipe: Mapped[dict[str, Any]]  # transfer.filters.discriminator.DiscriminatorRecipe
    discriminator_digest: Mapped[str] = mapped_column(String(64))  # of its weights and effective configuration
    discriminator_base: Mapped[dict[str, Any]]  # {model_id, weights_digest, tokenizer_digest}
    auc: Mapped[float] = mapped_column(Float)  # on held-out inputs
    settings: Mapped[dict[str, Any]]  # how the discriminator was trained and measured
    created_at: Mapped[datetime]

    files: Mapped[list[TransferableFileRow]] = relationship(order_by="TransferableFileRow.path", lazy="selectin")


class TransferableFileRow(Base):
    """A file of a discriminator."""

    __tablename__ = "transferable_files"

    adapter_id: Mapped[str] = mapped_column(ForeignKey("transferables.adapter_id"), primary_key=True)
    path: Mapped[str] = mapped_column(String(300), primary_key=True)
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)
    size: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(100))


class SealedInputRow(Base):
    """Inputs of a job that its parameters must not show. The document is gone a day after the job has ended; the row
    stays, so that a retry knows that something is missing."""

    __tablename__ = "sealed_inputs"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    document: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]


class TransferRow(Base):
    """A transfer: what was asked for, how it was judged, and what was decided.

    Adapters are named without a foreign key: a deleted one may lose its row, and the transfer stays on record.
    """

    __tablename__ = "transfers"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(64))  # of all that decides the new adapter
    request_key: Mapped[str] = mapped_column(String(64))  # of that, and of how it is measured and judged
    superseded_by: Mapped[str | None] = mapped_column(String(48))  # the job that does the same after this one failed
    adapter_id: Mapped[str] = mapped_column(String(48))
    adapter_name: Mapped[str] = mapped_column(String(200))
    source_model: Mapped[str] = mapped_column(ForeignKey("models.id"))
    target_model: Mapped[str] = mapped_column(ForeignKey("models.id"))
    method: Mapped[str] = mapped_column(String(40))
    schedule_id: Mapped[str | None] = mapped_column(ForeignKey("schedules.id"))
    seeds_digest: Mapped[str | None] = mapped_column(String(64))
    verdict: Mapped[str | None] = mapped_column(String(12))  # "pass" | "hold" | "fail"; null: not judged yet
    degraded: Mapped[bool] = mapped_column(Boolean, default=False)
    new_adapter: Mapped[str | None] = mapped_column(String(48))
    held: Mapped[dict[str, Any] | None]  # the adapter that waits for a decision
    decision: Mapped[str | None] = mapped_column(String(12))  # "publish" | "discard"
    decided_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    decided_at: Mapped[datetime | None]
    reason: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime]

    files: Mapped[list[HeldFileRow]] = relationship(order_by="HeldFileRow.path")

    __table_args__ = (
        partial_index("uq_transfers_request_key", "request_key", where="superseded_by IS NULL", unique=True),
        Index("ix_transfers_created", "created_at", "job_id"),
        Index("ix_transfers_adapter", "adapter_id", "created_at", "job_id"),
        Index("ix_transfers_source_model", "source_model", "created_at", "job_id"),
        Index("ix_transfers_target_model", "target_model", "created_at", "job_id"),
        Index("ix_transfers_verdict", "verdict", "created_at", "job_id"),
        partial_index("ix_transfers_schedule", "schedule_id", "created_at", "job_id", where="schedule_id IS NOT NULL"),
    )


class HeldFileRow(Base):
    """A file of an adapter that waits for a decision: its blob is in use."""

    __tablename__ = "held_files"

    job_id: Mapped[str] = mapped_column(ForeignKey("transfers.job_id"), primary_key=True)
    path: Mapped[str] = mapped_column(String(300), primary_key=True)
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"))
    size: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(100))

    __table_args__ = (Index("ix_held_files_sha256", "sha256"),)
