"""The tables of what transfers need: what an adapter keeps of its training, and inputs that only a worker reads.

Everything in them is as confidential as the training data: no answer, event, log line or metric has any of it but the
names, counts and digests that are said to be public.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Float, ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column, relationship

from storage.columns import Base


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
