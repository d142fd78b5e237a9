"""The menus: what can be done, with which parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path

from app.dependencies import Reader
from app.problems import problem_responses
from app.schemas.service import Method, MethodList, MethodSummary
from artifacts.errors import NotFound
from compose.catalog import METHODS as COMPOSE_METHODS
from compose.menu_row import Method as ComposeMethod
from merge.catalog import MENU as MERGE_MENU
from merge.catalog import MergeMethod, MergeSearch
from train.catalog import METHODS as TRAIN_METHODS
from train.menu_row import Method as TrainMethod
from transfer.catalog import METHODS as TRANSFER_METHODS
from transfer.catalog import TransferMethod

router = APIRouter(tags=["methods"])

Word = Annotated[str, Path(pattern="^[a-z0-9_-]{1,64}$")]


Kind = Literal["merge", "compose", "train", "transfer"]
Row = MergeMethod | MergeSearch | ComposeMethod | TrainMethod | TransferMethod

MENUS: Mapping[Kind, Mapping[str, Any]] = {
    "merge": MERGE_MENU,
    "compose": COMPOSE_METHODS,
    "train": TRAIN_METHODS,
    "transfer": TRANSFER_METHODS,
}


def _summary(kind: Kind, row: Row) -> MethodSummary:
    return MethodSummary(
        kind=kind,
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
    return MethodList(items=[_summary(kind, row) for kind, menu in MENUS.items() for row in menu.values()])


@router.get("/methods/{kind}/{name}", summary="Show a method", responses=problem_responses(404))
async def get_method(principal: Reader, kind: Word, name: Word) -> Method:
    """Its parameters as JSON Schema, with defaults, ranges and sources."""
    for known, menu in MENUS.items():
        if known == kind and name in menu:
            row: Row = menu[name]
            break
    else:
        raise NotFound(f"There is no {kind} method {name!r}.", hint="GET /methods lists them.")
    return Method(
        **_summary(known, row).model_dump(),
        when=getattr(row, "when", None),
        cost=getattr(row, "cost", None),
        output=getattr(row, "output", None),
        parameters_schema=row.options.model_json_schema(by_alias=False),
    )
