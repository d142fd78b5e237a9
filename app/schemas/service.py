"""What the service tells of itself: methods, workers, health, the codes of its problems."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, Field

from app.schemas.common import Timestamp
from storage.tables import ServerRow


class MethodSummary(BaseModel):
    kind: Literal["merge", "compose", "train", "transfer"]
    name: str
    title: str
    summary: str
    arxiv: str | None
    reference_url: str
    capabilities: dict[str, Any]


class Method(MethodSummary):
    when: str | None = Field(None, description="When to take it rather than another.")
    cost: str | None = Field(None, description="What it costs beside the plain method.")
    output: str | None = Field(None, description="What comes out, and what loads it.")
    parameters_schema: dict[str, Any] = Field(description="JSON Schema of `parameters`, with defaults and ranges.")


class MethodList(BaseModel):
    items: list[MethodSummary]


class Slot(BaseModel):
    name: str
    device: str
    host: str = Field("", description="The machine or node that its worker runs on.")
    state: str = Field(description="starting, idle, running or stopping.")
    pid: int | None = None
    job_id: str | None = None
    attempt: int | None = None
    warm: list[str] = Field(default_factory=list, description="Ids of the base models that its worker holds.")
    problem: str | None = Field(None, description="Why no worker could be started.")


class Server(BaseModel):
    id: str
    boot_id: str
    host: str
    pool: str = Field(description="What runs its workers: local or ray.")
    started_at: Timestamp
    seen_at: Timestamp
    slots: list[Slot]

    @classmethod
    def of(cls, row: ServerRow) -> Self:
        return cls.model_validate(row, from_attributes=True)


class WorkerList(BaseModel):
    items: list[Server]


class Health(BaseModel):
    status: Literal["ok"]


class Readiness(BaseModel):
    status: Literal["ready"]
    checks: dict[str, str]


class Index(BaseModel):
    name: str
    version: str
    links: dict[str, str]


class ProblemType(BaseModel):
    code: str
    status: int
    title: str


class ProblemTypeList(BaseModel):
    items: list[ProblemType]
