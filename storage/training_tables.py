"""The tables of jobs that train: the newest checkpoint of each, what it measured, and what clients gave it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Integer, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from storage.columns import Base, partial_index


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


class ClientUpdateRow(Base):
    """A client in a round of a federated training: what it is asked for, and what it gave."""

    __tablename__ = "client_updates"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    round: Mapped[int] = mapped_column(Integer, primary_key=True)  # from 0
    client: Mapped[int] = mapped_column(Integer, primary_key=True)  # its place in the parameters, from 0
    state: Mapped[str] = mapped_column(String(12))  # "pending" | "answered" | "lost" | "late" | "refused"
    # the job that does the client's steps; None of a client on a machine of its own
    child_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True)
    sha256: Mapped[str | None] = mapped_column(ForeignKey("blobs.sha256"), index=True)  # of its tensors, until averaged
    details: Mapped[dict[str, Any]]
    reason: Mapped[str | None] = mapped_column(Text)  # why there is nothing usable
    deadline: Mapped[datetime]
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]

    __table_args__ = (partial_index("ix_client_updates_pending", "job_id", "round", where="state = 'pending'"),)
