"""The menus: what can be done, with which parameters."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Path

from app.dependencies import Reader
from app.problems import problem_responses
from app.schemas.service import Method, MethodList, MethodSummary
from artifacts.errors import NotFound
from merge.catalog import METHODS, MergeMethod

router = APIRouter(tags=["methods"])

Word = Annotated[str, Path(pattern="^[a-z0-9_-]{1,64}$")]


def _summary(row: MergeMethod) -> MethodSummary:
    return MethodSummary(
        kind="merge",
        name=row.name,
        title=row.title,
        summary=row.summary,
        arxiv=row.arxiv,
        reference_url=row.reference_url,
        capabilities=asdict(row.capabilities),
    )


@router.get("/methods", summary="List methods", responses=problem_responses())
async def list_methods(principal: Reader) -> MethodList:
    """Every method of every kind of job."""
    return MethodList(items=[_summary(row) for row in METHODS.values()])


@router.get("/methods/{kind}/{name}", summary="Show a method", responses=problem_responses(404))
async def get_method(principal: Reader, kind: Word, name: Word) -> Method:
    """Its parameters as JSON Schema, with defaults, ranges and sources."""
    if kind != "merge" or name not in METHODS:
        raise NotFound(f"There is no {kind} method {name!r}.", hint="GET /methods lists them.")
    row = METHODS[name]
    return Method(**_summary(row).model_dump(), parameters_schema=row.options.model_json_schema(by_alias=False))
