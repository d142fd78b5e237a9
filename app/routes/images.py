"""Composed images: list, show, look at, delete."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import JSONResponse, Response

from app.dependencies import HEX_ID, Reader, ServicesDep, Writer
from app.file_answers import answer_file, file_responses, file_route
from app.image_answers import IMAGE_NAME, PNG, image_file, wants_png
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.schemas.common import PageOf, as_json
from app.schemas.images import Image, ImageQuery, ImageSummary
from storage import images

router = APIRouter(tags=["images"], route_class=JsonRoute)

ImageId = Annotated[str, Path(pattern=f"^img_{HEX_ID}$", description="Id of the image.")]
FileName = Annotated[
    str, Path(pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$", description="Name of a file, as the image lists it.")
]
_FILES = file_responses((PNG, "image/svg+xml"))


@router.get("/images", summary="List images", responses=problem_responses())
def list_images(
    services: ServicesDep, principal: Reader, query: Annotated[ImageQuery, Query()]
) -> PageOf[ImageSummary]:
    """Newest first. `next` is the cursor of the next page, with the same filter."""
    with services.database.read() as session:
        page = images.list_images(session, job_id=query.job_id, cursor=query.cursor, limit=query.limit)
        return PageOf[ImageSummary](items=[ImageSummary.of(row) for row in page.items], next=page.next)


@router.get(
    "/images/{image_id}",
    summary="Show an image",
    response_model=Image,
    responses={**_FILES, 200: {"description": "What is known of it, or the PNG", "content": _FILES[200]["content"]}},
)
def get_image(request: Request, services: ServicesDep, principal: Reader, image_id: ImageId) -> Response:
    """Its recipe, report and files as JSON; with `Accept: image/png` the image itself."""
    if wants_png(request):
        response = answer_file(request, services, image_file(services, image_id, IMAGE_NAME))
    else:
        with services.database.read() as session:
            response = JSONResponse(as_json(Image.of(images.get_image(session, image_id))))
    response.headers["Vary"] = "Accept"
    return response


@router.delete("/images/{image_id}", status_code=204, summary="Delete an image", responses=problem_responses(404, 507))
def delete_image(services: ServicesDep, principal: Writer, image_id: ImageId) -> Response:
    """The image disappears, its bytes a day later."""
    with services.database.write() as session:
        images.delete_image(session, image_id)
    return Response(status_code=204)


@file_route(
    router,
    "/images/{image_id}/files/{name}",
    summary="Look at an image, a mask or other evidence",
    head_summary="Ask for the size and ETag of a file of an image",
    responses=_FILES,
)
def get_image_file(
    request: Request, services: ServicesDep, principal: Reader, image_id: ImageId, name: FileName
) -> Response:
    """Takes Range, If-Range and If-None-Match."""
    return answer_file(request, services, image_file(services, image_id, name))
