"""The tables of aliases: names that point to an adapter, and every switch of one."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey, Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from storage.columns import Base


class AliasRow(Base):
    """A name under which an adapter is served. `version` counts its switches (ETag)."""

    __tablename__ = "aliases"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), index=True)
    version: Mapped[int] = mapped_column(Integer)
    created_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]

    __table_args__ = (Index("ix_aliases_created", "created_at", "name"),)


class AliasSwitchRow(Base):
    """A switch, the making of the alias first. The adapters may be gone by now."""

    __tablename__ = "alias_switches"

    name: Mapped[str] = mapped_column(ForeignKey("aliases.name"), primary_key=True)
    version: Mapped[int] = mapped_column(Integer, primary_key=True)  # of the alias from then on
    adapter_id: Mapped[str] = mapped_column(String(48))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))  # the transfer that passed; null: by a call
    created_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    created_at: Mapped[datetime]
