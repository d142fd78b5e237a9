"""The application factory: `uvicorn app.main:create_app --factory`, or `rankwise serve`."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware

from app import problems
from app.chores import chores
from app.logs import configure_logging
from app.metrics import Metrics
from app.middleware import BodyLimitMiddleware, RequestMiddleware
from app.openapi import complete, operation_id
from app.remotes import remotes_of
from app.routes import (
    adapters,
    aliases,
    attempts,
    compose,
    datasets,
    exchange,
    fleets,
    images,
    jobs,
    load_checks,
    merge,
    methods,
    models,
    pictures,
    quantize,
    remote_clients,
    schedules,
    service,
    train,
    transfer,
    uploads,
    webhooks,
    workers,
)
from app.service_state import service_figures, service_stored_figures
from app.settings import Settings
from app.staging import sweep_staging
from app.state import Services
from app.version import VERSION
from storage.blobs import BlobStore
from storage.database import Database
from workers.clockwork import Clockwork
from workers.identity import read_server_id
from workers.providers import RaySettings
from workers.supervisor import PoolSettings, Supervisor

MULTIPART_OVERHEAD = 1024**2
"""What the form around the files of an upload may add: part headers, boundaries, text fields."""

_UPLOADS = (
    ("POST", re.compile("/adapters|/datasets")),
    ("PATCH", re.compile("/uploads/[^/]+")),
    ("PUT", re.compile("/jobs/[^/]+/clients/[^/]+/rounds/[^/]+/update")),
)
"""The calls whose bodies are files."""

_DESCRIPTION = (
    "Stores LoRA adapters, merges them, composes images with them, trains them and moves them to other base models. "
    "Errors are RFC 9457 problems; their `code` is stable. Lists are keyset pages: pass `next` as `cursor`. Every POST "
    "takes `Idempotency-Key`."
)
_log = structlog.stdlib.get_logger(__name__)


class RankwiseAPI(FastAPI):
    """FastAPI with a complete OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            services: Services = self.state.services
            complete(super().openapi(), api_keys=services.settings.api_keys)
        return super().openapi()


def create_app(settings: Settings | None = None) -> RankwiseAPI:
    """The application. Nothing is opened before its lifespan begins.

    Raises:
        pydantic.ValidationError: settings that contradict each other, from the environment.
    """
    settings = settings or Settings()
    configure_logging(settings.log_level, settings.log_format)
    services = Services(settings, Database(settings.database_url), BlobStore(settings.blob_url), Metrics())
    services.metrics.observe_service(
        lambda: service_figures(services.database, settings), lambda: service_stored_figures(services.database)
    )
    upload_limit = settings.max_upload_bytes + MULTIPART_OVERHEAD
    app = RankwiseAPI(
        title="Rankwise",
        version=VERSION,
        description=_DESCRIPTION,
        lifespan=_lifespan,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=operation_id,
        middleware=[
            Middleware(RequestMiddleware, metrics=services.metrics),
            Middleware(
                BodyLimitMiddleware,
                limit=settings.max_body_bytes,
                routes=dict.fromkeys(_UPLOADS, upload_limit),
            ),
        ],
    )
    app.state.services = services
    problems.install(app)
    for room in (
        service,
        exchange,
        adapters,
        uploads,
        aliases,
        datasets,
        merge,
        compose,
        train,
        remote_clients,
        transfer,
        models,
        quantize,
        images,
        jobs,
        load_checks,
        attempts,
        pictures,
        schedules,
        fleets,
        webhooks,
        methods,
        workers,
    ):
        app.include_router(room.router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    await run_in_threadpool(start, services)
    try:
        yield
    finally:
        await run_in_threadpool(stop, services)


def start(services: Services) -> None:
    """Bring the tables up to date, look at the blob store, and start the pool and the chores.

    Raises:
        DatabaseUnavailable, BlobStoreUnavailable: the server can not work like this.
        StateConflict: another process serves from this data folder.
    """
    settings = services.settings
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    services.database.upgrade()
    services.blobs.check()
    sweep_staging(services.staging, settings.staging_max_age_hours)
    if settings.pool != "off":
        supervisor = Supervisor(pool_settings(settings), observer=services.metrics.pool)
        supervisor.start()
        services.supervisor = supervisor
    services.clockwork = Clockwork(chores(settings, services.database, services.blobs, fired=services.job_made))
    services.clockwork.start()
    _log.info("server_started", pool=settings.pool, api_keys=settings.api_keys, data_dir=str(settings.data_dir))


def stop(services: Services) -> None:
    """Stop the chores and, gracefully, the pool, and close the database."""
    if services.clockwork is not None:
        services.clockwork.stop()
        services.clockwork = None
    if services.supervisor is not None:
        services.supervisor.stop()
        services.supervisor = None
    services.database.dispose()


def pool_settings(settings: Settings) -> PoolSettings:
    """What a supervisor of this server needs to know."""
    return PoolSettings(
        pool="ray" if settings.pool == "ray" else "local",
        ray=RaySettings(
            address=settings.ray_address or os.environ.get("RAY_ADDRESS") or "auto",
            work_dir=settings.ray_work_dir or None,
            slot_resources=settings.ray_slot_resources or None,
        ),
        server_id=read_server_id(settings.data_dir),
        database_url=settings.database_url,
        blob_url=settings.blob_url,
        data_dir=settings.data_dir,
        devices=settings.devices,
        lease_seconds=settings.lease_seconds,
        beat_seconds=settings.beat_seconds,
        grace_seconds=settings.grace_seconds,
        model_roots=settings.model_roots,
        warm_bytes=settings.warm_bytes,
        safety_checker=None if settings.safety_checker is None else str(settings.safety_checker),
        remotes=remotes_of(settings),
    )
