"""Pieces that several resources share."""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PlainSerializer, StringConstraints

from app.dependencies import PLAIN
from artifacts.compatibility import Engine

Item = TypeVar("Item")

Timestamp = Annotated[
    AwareDatetime,
    PlainSerializer(lambda value: value.isoformat().replace("+00:00", "Z"), return_type=str, when_used="json"),
]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=PLAIN)]
BaseModelName = Annotated[str, StringConstraints(min_length=1, max_length=300, pattern=PLAIN)]

TargetEngine = Annotated[
    Engine | None,
    Field(
        description="What will load the adapter: a request whose result it would not load is refused, and the same ΔW "
        "is written with one rank and scaling 1 where it needs that. The report tells, at `target_engine`."
    ),
]


class RequestModel(BaseModel):
    """A body that a client sends: unknown fields are an error, since they would be ignored in silence otherwise."""

    model_config = ConfigDict(extra="forbid")


class PageOf(BaseModel, Generic[Item]):
    """One page of a list, newest first."""

    items: list[Item]
    next: str | None = Field(description="Cursor of the next page; null on the last.")


def as_json(model: BaseModel, **options: Any) -> Any:
    """The JSON value of `model`."""
    return model.model_dump(mode="json", **options)
