"""The service itself: index, health, metrics, the codes of its problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Path
from starlette.responses import Response

from app.dependencies import Reader, ServicesDep
from app.metrics import CONTENT_TYPE
from app.problems import NotReady, error_classes, problem_responses
from app.schemas.service import Health, Index, ProblemType, ProblemTypeList, Readiness
from app.state import Services
from app.version import VERSION
from artifacts.errors import FieldError, NotFound, RankwiseError

router = APIRouter(tags=["service"])
_LINKS = ("adapters", "merge", "models", "jobs", "methods", "workers", "healthz", "readyz", "metrics", "docs")


@router.get("/", summary="Index")
async def index() -> Index:
    """Where things are."""
    return Index(name="rankwise", version=VERSION, links={name: f"/{name}" for name in _LINKS})


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> Health:
    """Always ok: whoever can answer is alive."""
    return Health(status="ok")


@router.get("/readyz", summary="Can it serve?", responses={503: problem_responses()[503]})
def readyz(services: ServicesDep) -> Readiness:
    """Asks the database, the blob store and the pool; 503 with each finding when one of them is down."""
    checks: dict[str, str] = {}
    findings: list[FieldError] = []
    probes: dict[str, Callable[[], None]] = {
        "database": services.database.check,
        "blobs": services.blobs.check,
        "pool": lambda: _check_pool(services),
    }
    for name, probe in probes.items():
        try:
            probe()
        except RankwiseError as error:
            findings.append(FieldError(f"/checks/{name}", error.detail))
        else:
            checks[name] = "ok"
    if findings:
        raise NotReady("; ".join(f"{item.pointer[8:]}: {item.message}" for item in findings), errors=findings)
    if services.settings.pool == "off":
        checks["pool"] = "off"
    return Readiness(status="ready", checks=checks)


def _check_pool(services: Services) -> None:
    if services.settings.pool != "off" and (services.supervisor is None or not services.supervisor.alive):
        raise NotReady("the pool of this server does not run")


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={
        200: {"description": "The text exposition format", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **problem_responses(),
    },
)
def metrics(services: ServicesDep, principal: Reader) -> Response:
    """Requests, uploads, jobs by state, slots by device."""
    return Response(services.metrics.render(), headers={"Content-Type": CONTENT_TYPE})


def _problem_type(cls: type[RankwiseError]) -> ProblemType:
    return ProblemType(code=cls.code, status=cls.status, title=cls.title)


@router.get("/problems", summary="List the codes of problems")
async def list_problems() -> ProblemTypeList:
    """Every `code` that an error can have."""
    return ProblemTypeList(items=[_problem_type(cls) for _, cls in sorted(error_classes().items())])


@router.get(
    "/problems/{code}",
    summary="Explain a code",
    responses={status: problem_responses(404)[status] for status in (404, 422)},
)
async def get_problem(code: Annotated[str, Path(pattern="^[a-z0-9_]{1,64}$")]) -> ProblemType:
    """What the `type` of a problem points to."""
    classes = error_classes()
    if code not in classes:
        raise NotFound(f"There is no problem with the code {code!r}.", hint="GET /problems lists them.")
    return _problem_type(classes[code])
