"""The table of API keys, with their limits."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from storage.columns import Base


class ApiKeyRow(Base):
    """A key is 32 random bytes; only its SHA-256 is kept, which needs no slow hash at that entropy."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    prefix: Mapped[str] = mapped_column(String(16), unique=True)
    sha256: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]]
    max_queued: Mapped[int | None] = mapped_column(Integer)  # jobs that may wait; null: as many as the service allows
    max_running: Mapped[int | None] = mapped_column(Integer)  # device slots that its jobs may hold at once
    max_bytes: Mapped[int | None] = mapped_column(BigInteger)  # of stored files
    stored_bytes: Mapped[int] = mapped_column(BigInteger, default=0)  # of what it made and is live
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
