"""Pictures of a job as the interface shows them."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, Field

from artifacts.svg import Drawing


class Picture(BaseModel):
    """Numbers of a job that can be looked at."""

    name: str = Field(description="Of the picture within its job.")
    title: str = Field(description="What it shows.")
    link: str = Field(description="Where it is, as SVG.")

    @classmethod
    def of(cls, job_id: str, found: Drawing) -> Self:
        return cls(name=found.name, title=found.title, link=f"/jobs/{job_id}/pictures/{found.name}")


class PictureList(BaseModel):
    """All pictures of a job; none before it has succeeded."""

    items: list[Picture]
