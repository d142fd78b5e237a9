"""What became of every key of an adapter's file: large, seldom asked for, and so no column of the adapters."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Integer, LargeBinary
from sqlalchemy.orm import Mapped, mapped_column

from storage.columns import Base


class AdapterKeysRow(Base):
    """The verdicts on all keys, as compressed JSON in the order of the file."""

    __tablename__ = "adapter_keys"

    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    count: Mapped[int] = mapped_column(Integer)
    document: Mapped[bytes] = mapped_column(LargeBinary)
