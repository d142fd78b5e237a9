"""The tables of jobs that make images: the images with their files, and what a job that runs shows of its own."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, LargeBinary, String, Text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from storage.columns import Base, partial_index


class ImageRow(Base):
    """An image that a job made. Deleting sets `deleted_at`."""

    __tablename__ = "images"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    position: Mapped[int] = mapped_column(Integer)  # among the images of its job
    label: Mapped[str] = mapped_column(String(200))  # what tells it from the others of its job
    method: Mapped[str | None] = mapped_column(String(40))  # null: a sheet of several
    base_model: Mapped[str] = mapped_column(String(300))
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"))
    prompt: Mapped[str] = mapped_column(Text)
    seed: Mapped[int] = mapped_column(BigInteger)
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    recipe: Mapped[dict[str, Any]]  # what makes it again; the file carries it too
    report: Mapped[dict[str, Any]]
    size: Mapped[int] = mapped_column(BigInteger)  # bytes of all its files
    created_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]

    files: Mapped[list[ImageFileRow]] = relationship(order_by="ImageFileRow.position", lazy="selectin")

    __table_args__ = (
        partial_index("ix_images_created", "created_at", "id", "deleted_at", where="deleted_at IS NULL"),
        partial_index("ix_images_job", "job_id", "created_at", "id", "deleted_at", where="deleted_at IS NULL"),
    )


class ImageFileRow(Base):
    """One file of an image: the picture itself, a mask, or other evidence."""

    __tablename__ = "image_files"

    image_id: Mapped[str] = mapped_column(ForeignKey("images.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    position: Mapped[int] = mapped_column(Integer)
    role: Mapped[str] = mapped_column(String(16))  # "image" | "mask" | "picture"
    details: Mapped[dict[str, Any]]  # of a mask: {concept, step}
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"))
    size: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(100))

    __table_args__ = (Index("ix_image_files_sha256", "sha256"),)


class JobPreviewRow(Base):
    """What the image of a job that runs looks like by now: a small picture, replaced by the next one."""

    __tablename__ = "job_previews"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer)
    step: Mapped[int] = mapped_column(Integer)
    media_type: Mapped[str] = mapped_column(String(100))
    data: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime]
