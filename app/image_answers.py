"""Images as answers: whether a client wants the picture or what is known of it, and a job that is waited for."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from app.content_choice import prefers
from app.file_answers import answer_file
from app.idempotency import Answer
from app.job_answers import answer_or_wait, job_body
from app.problems import error_classes, problem
from app.state import Services
from app.waiting import wait_for_job
from artifacts.errors import BlobMissing, RankwiseError
from storage import images
from storage.downloads import Download
from storage.segments import BlobSlice
from storage.tables import ImageFileRow

PNG = "image/png"
IMAGE_NAME = "image.png"


def wants_png(request: Request) -> bool:
    """Whether the client would rather have the picture than JSON."""
    return prefers(request, PNG)


def image_file(services: Services, image_id: str, name: str) -> Download:
    """A file of an image, to send.

    Raises:
        NotFound: there is no such image or file.
        BlobMissing: the store has lost it.
    """
    with services.database.read() as session:
        row = images.get_file(session, image_id, name)
    return _download(services, row)


def _download(services: Services, row: ImageFileRow) -> Download:
    if not services.blobs.exists(row.sha256):
        raise BlobMissing(
            f"The bytes of {row.name} of the image {row.image_id} (sha256 {row.sha256}) are missing.",
            hint="Restore them from a backup, or compose the image again from its recipe.",
        )
    file_name = f"{row.image_id}-{row.name}" if row.name != IMAGE_NAME else f"{row.image_id}.png"
    return Download((BlobSlice(row.sha256, 0, row.size),), f'"{row.sha256}"', row.media_type, file_name)


async def answer_image_or_job(request: Request, services: Services, answer: Answer, seconds: float) -> Response:
    """The image itself for a client that asks for it and waits long enough; else as for every other job.

    A job that ended without an image in that time is a problem to such a client.
    """
    if not wants_png(request) or seconds <= 0:
        return await answer_or_wait(request, services, answer, seconds)
    job_id: str = answer.body["id"]
    if not await wait_for_job(request, services, job_id, seconds):
        return answer.response()
    return await run_in_threadpool(_finished, request, services, answer, job_id)


def _finished(request: Request, services: Services, answer: Answer, job_id: str) -> Response:
    job = job_body(services, job_id)
    if job["state"] != "succeeded":
        return _failed(request, job)
    if not job["result"]["images"]:  # the method yields an adapter
        return Answer(200, job, answer.headers).response(**{"Preference-Applied": "wait"})
    image_id = job["result"]["images"][0]
    response = answer_file(request, services, image_file(services, image_id, IMAGE_NAME))
    response.headers.update({**answer.headers, "Content-Location": f"/images/{image_id}", "Preference-Applied": "wait"})
    return response


def _failed(request: Request, job: dict[str, object]) -> Response:
    """What went wrong, with the status that it would have had when it was submitted."""
    found = job["error"]
    error = found if isinstance(found, dict) else {"code": "job_cancelled", "detail": "The job was cancelled."}
    kind = error_classes().get(str(error["code"]), RankwiseError)
    return problem(
        request.scope,
        status=409 if job["state"] == "cancelled" else kind.status,
        code=str(error["code"]),
        title=kind.title,
        detail=str(error["detail"]),
        hint=error.get("hint"),
        headers={"Location": f"/jobs/{job['id']}", "Preference-Applied": "wait"},
    )
