"""The rounds of a federated training as the interface shows them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal, Self

from pydantic import BaseModel, Field

from app.schemas.common import Timestamp
from storage.tables import ClientUpdateRow


class ClientUpdate(BaseModel):
    """A client in a round."""

    client: int = Field(description="Its place in `parameters.clients`, from 0.")
    state: Literal["pending", "answered", "lost", "late", "refused"] = Field(
        description="pending: at work, or waited for; answered: what it gave is, or will be, in the average; lost: its "
        "job failed or was cancelled; late: not done before the deadline; refused: what it gave can not be used."
    )
    job_id: str | None = Field(description="The job that does its steps; null of a remote client.")
    reason: str | None = Field(description="Why it gave nothing usable.")
    rows: int | None = Field(None, description="That it trains on.")
    seconds: float | None = Field(None, description="That its steps took.")
    loss: float | None = Field(None, description="Mean over its steps; null with privacy.")
    bytes: int | None = Field(None, description="That it gave back.")
    sha256: str | None = Field(None, description="Of what a remote client gave back.")
    epsilon: float | None = Field(None, description="ε that it has spent by the end of the round.")
    deadline: Timestamp
    finished_at: Timestamp | None

    @classmethod
    def of(cls, row: ClientUpdateRow) -> Self:
        return cls.model_validate(
            {
                "client": row.client,
                "state": row.state,
                "job_id": row.child_id,
                "reason": row.reason,
                "deadline": row.deadline,
                "finished_at": row.finished_at,
                **row.details,
            }
        )


class Round(BaseModel):
    """What the clients did before one average."""

    round: int = Field(description="From 1.")
    clients: list[ClientUpdate]


class RoundList(BaseModel):
    """Rounds in their order."""

    items: list[Round]
    next_round: int | None = Field(description="Ask again with `after` of this for the rest; null at the end.")

    @classmethod
    def of(cls, rows: Sequence[ClientUpdateRow], limit: int) -> Self:
        items = [
            Round(round=number + 1, clients=[ClientUpdate.of(row) for row in part])
            for number, part in groupby(rows, key=lambda row: row.round)
        ]
        return cls(items=items, next_round=items[-1].round if len(items) == limit else None)
