"""How an adapter can be made again, as the interface shows it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class RecipeCall(BaseModel):
    """A call of this service."""

    path: str = Field(description="What to POST to.")
    body: dict[str, Any] = Field(description="JSON, complete: defaults are written out.")


class Recipe(BaseModel):
    """The call that makes something again."""

    call: RecipeCall | None = Field(description="Null if it can not be made again here.")
    versions: dict[str, str] = Field(default_factory=dict, description="Libraries that computed it.")
    reproducible: bool = Field(False, description="Whether the call gives the same bytes on a server as this one is.")
    because: list[str] = Field(default_factory=list, description="What stands against that; empty if nothing does.")


class ModelRecipe(Recipe):
    """The call that makes a base model again."""

    model: str


class AdapterRecipe(Recipe):
    """The call that makes an adapter again."""

    adapter: str
    origin: str = Field(description="upload, or the kind of the job that made it.")
    found_by: RecipeCall | None = Field(
        None, description="Of the result of a search: the search itself, which tries everything again."
    )
