"""The tables of jobs that train: the newest checkpoint of each, and what it measured on the way."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Integer
from sqlalchemy.orm import Mapped, mapped_column

from storage.columns import Base


class JobCheckpointRow(Base):
    """Where an interrupted job goes on: one file that holds everything, written by attempt `attempt`."""

    __tablename__ = "job_checkpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer)
    step: Mapped[int] = mapped_column(Integer)
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class JobMetricRow(Base):
    """What a job measured in one of its steps; the step is measured again when it is done again after a checkpoint."""

    __tablename__ = "job_metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(Integer, primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer)
    numbers: Mapped[dict[str, Any]]  # name → number
    created_at: Mapped[datetime]
