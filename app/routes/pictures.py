"""Pictures of what a job has found, such as the rank of every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Path
from starlette.responses import Response

from app.dependencies import JobId, Reader, ServicesDep
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.schemas.pictures import Picture, PictureList
from app.state import Services
from artifacts.errors import NotFound
from artifacts.heat_map import NAME, pictures_of
from artifacts.svg import MEDIA_TYPE, Drawing
from merge.pictures import pictures_of_comparison, pictures_of_merge
from storage import jobs

router = APIRouter(tags=["jobs"], route_class=JsonRoute)

PictureName = Annotated[str, Path(pattern=NAME, max_length=100, description="Name of the picture.")]


@router.get("/jobs/{job_id}/pictures", summary="List the pictures of a job", responses=problem_responses(404))
def list_pictures(services: ServicesDep, principal: Reader, job_id: JobId) -> PictureList:
    """What the job's method shows of its result, as heat maps: the report has the numbers."""
    return PictureList(items=[Picture.of(job_id, found) for found in _pictures(services, job_id)])


@router.get(
    "/jobs/{job_id}/pictures/{name}",
    summary="See a picture of a job",
    response_class=Response,
    responses={200: {"content": {MEDIA_TYPE: {"schema": {"type": "string"}}}}, **problem_responses(404)},
)
def get_picture(services: ServicesDep, principal: Reader, job_id: JobId, name: PictureName) -> Response:
    """As SVG."""
    found = {picture.name: picture for picture in _pictures(services, job_id)}
    if name not in found:
        there = f"It has: {', '.join(found)}." if found else "It has none; pictures are there once a job has succeeded."
        raise NotFound(f"The job {job_id} has no picture {name!r}.", hint=there)
    return Response(found[name].draw(), media_type=MEDIA_TYPE)


_OF_REPORTS: Mapping[str, Callable[[Mapping[str, Any]], list[Drawing]]] = {
    "merge": pictures_of_merge,
    "merge_compare": pictures_of_comparison,
}
"""Of the kinds whose whole report can be drawn."""


def _pictures(services: Services, job_id: str) -> list[Drawing]:
    with services.database.read() as session:
        row = jobs.get_job(session, job_id)
        kind, report = row.kind, (row.result or {}).get("report") or {}
    draw = _OF_REPORTS.get(kind)
    return [*(draw(report) if draw is not None else []), *pictures_of(report.get("own") or {})]
