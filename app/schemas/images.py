"""Composed images as the interface shows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, StringConstraints

from app.dependencies import HEX_ID, PageQuery
from app.schemas.common import Timestamp
from storage.tables import ImageRow


class ImageQuery(PageQuery):
    """Filters of the list."""

    job_id: Annotated[str, StringConstraints(pattern=f"^job_{HEX_ID}$")] | None = Field(
        None, description="Those that this job made."
    )


class ImageFile(BaseModel):
    """A file of an image."""

    name: str
    role: Literal["image", "mask", "picture"] = Field(
        description="image: the image itself; mask: where a concept is; picture: other evidence."
    )
    details: dict[str, Any] = Field(description="Of a mask its concept and its step, from 0.")
    media_type: str
    size: int = Field(description="Bytes.")
    sha256: str
    link: str


class ImageSummary(BaseModel):
    """An image, without its report."""

    id: str
    job_id: str
    label: str = Field(description="What tells it from other images of its job, such as its method.")
    method: str | None = Field(description="null: a sheet of several images.")
    base_model: str
    prompt: str
    seed: int
    width: int
    height: int
    size: int = Field(description="Bytes of all its files.")
    created_at: Timestamp
    link: str = Field(description="Where the PNG is.")

    @classmethod
    def of(cls, row: ImageRow) -> Self:
        return cls.model_validate(_summary(row))


class Image(ImageSummary):
    """Everything that is known of an image."""

    model_id: str | None
    recipe: dict[str, Any] = Field(description="All that makes it again; the PNG carries it in its chunk `rankwise`.")
    files: list[ImageFile]
    report: dict[str, Any]

    @classmethod
    def of(cls, row: ImageRow) -> Self:
        files = [
            ImageFile(
                name=file.name,
                role=file.role,
                details=file.details,
                media_type=file.media_type,
                size=file.size,
                sha256=file.sha256,
                link=f"/images/{row.id}/files/{file.name}",
            )
            for file in row.files
        ]
        return cls.model_validate(
            {
                **_summary(row),
                "model_id": row.model_id,
                "recipe": row.recipe,
                "files": files,
                "report": row.report,
            }
        )


def _summary(row: ImageRow) -> dict[str, Any]:
    names = [name for name in ImageSummary.model_fields if name != "link"]
    return {**{name: getattr(row, name) for name in names}, "link": f"/images/{row.id}/files/image.png"}
