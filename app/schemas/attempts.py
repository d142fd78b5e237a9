"""Attempts of a job as the interface shows them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from app.schemas.common import Timestamp
from storage.tables import JobAttemptRow


class LogQuery(BaseModel):
    """Which log, and whether to wait for more of it."""

    model_config = ConfigDict(extra="forbid")

    attempt: int | None = Field(None, ge=1, le=2**31 - 1, description="Number of the attempt; the newest if left out.")
    follow: bool = Field(False, description="Send what comes until the attempt has ended.")


class AttemptExit(BaseModel):
    """How the worker process ended; code and signal are null while it lives on to serve other attempts."""

    code: int | None = None
    signal: int | None = None
    peak_memory: int | None = Field(None, description="Largest resident set during the attempt, in bytes.")


class Attempt(BaseModel):
    """One attempt at a job: where it ran and how it ended."""

    attempt: int
    server: str = Field(description="Id of the server that ran it.")
    slot: str = Field(description="Its device slots, comma-separated.")
    pid: int | None
    started_at: Timestamp
    finished_at: Timestamp | None
    outcome: Literal["succeeded", "failed", "cancelled", "lost", "paused"] | None = Field(
        description="Null while it runs; lost: its process or server ended, and the job was queued again or failed; "
        "paused: it waits for jobs of its own."
    )
    exit: AttemptExit | None
    has_log: bool = Field(description="Whether its log is kept for good; one that printed nothing has none.")

    @classmethod
    def of(cls, row: JobAttemptRow) -> Self:
        return cls.model_validate(
            {
                "attempt": row.attempt,
                "server": row.server_id,
                "slot": row.slot,
                "pid": row.pid,
                "started_at": row.started_at,
                "finished_at": row.finished_at,
                "outcome": row.outcome,
                "exit": row.exit,
                "has_log": row.log_sha256 is not None,
            }
        )


class AttemptList(BaseModel):
    """All attempts, the first one first; a job has only a few."""

    items: list[Attempt]
