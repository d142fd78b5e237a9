"""The tables of uploads that come in pieces, and of the pieces that are there."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from storage.columns import Base


class UploadRow(Base):
    """A file on its way. Its bytes are the segments, in the order of their first byte, up to `received`."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    created_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    file_name: Mapped[str] = mapped_column(String(300))
    form: Mapped[dict[str, Any]]  # what the adapter's row will say
    length: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    received: Mapped[int] = mapped_column(BigInteger)
    segments: Mapped[int] = mapped_column(Integer)
    state: Mapped[str] = mapped_column(String(10))  # open, done or failed
    adapter_id: Mapped[str | None] = mapped_column(String(48))  # of a done one; may be gone by now
    error: Mapped[dict[str, Any] | None]  # of a failed one: {code, detail}
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]

    __table_args__ = (
        Index("ix_uploads_created", "created_at", "id"),
        Index("ix_uploads_created_by", "created_by"),
        Index("ix_uploads_expires_at", "expires_at"),
    )


class UploadSegmentRow(Base):
    """Some bytes of an upload, which are a blob."""

    __tablename__ = "upload_segments"

    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), primary_key=True)
    start: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)
