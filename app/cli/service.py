"""`rankwise serve` and `rankwise worker`: the processes that stay up."""

from __future__ import annotations

import gc
import signal
import threading
from types import FrameType
from typing import Annotated

import typer

from app.cli.config import load_settings
from app.cli.options import DataDir

Devices = Annotated[
    str | None, typer.Option("--devices", help="Device slots: auto, cpu:2, cuda:0,1 (RANKWISE_DEVICES).")
]


def serve(
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on (RANKWISE_HOST).")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port to listen on (RANKWISE_PORT).")] = None,
    data_dir: DataDir = None,
    devices: Devices = None,
) -> None:
    """Start the service: HTTP, and the pool of worker processes unless RANKWISE_POOL=off."""
    settings = load_settings(host=host, port=port, data_dir=data_dir, devices=devices)
    import uvicorn

    from app.main import create_app

    app = create_app(settings)
    app.openapi()  # made once, and now rather than for the first who asks
    _spare_the_collector()
    # The application configures logging and writes the access log itself.
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
    )


def _spare_the_collector() -> None:
    """What is loaded now stays for ever: the garbage collector need not look at it, which takes 0.1 s each time."""
    gc.collect()
    gc.freeze()


def worker(data_dir: DataDir = None, devices: Devices = None) -> None:
    """Work off jobs without serving HTTP, beside other servers of the same database and blob store."""
    from app.chores import chores
    from app.exporter import exported
    from app.logs import configure_logging
    from app.main import pool_settings
    from app.metrics import Metrics
    from app.service_state import service_figures, service_stored_figures
    from storage.blobs import BlobStore
    from storage.database import Database
    from workers.clockwork import Clockwork
    from workers.supervisor import Supervisor

    settings = load_settings(data_dir=data_dir, devices=devices)
    configure_logging(settings.log_level, settings.log_format)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database_url)
    database.upgrade()
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    metrics = Metrics()
    metrics.observe_service(lambda: service_figures(database, settings), lambda: service_stored_figures(database))
    supervisor = Supervisor(pool_settings(settings), observer=metrics.pool)
    supervisor.start()
    clockwork = Clockwork(chores(settings, database, BlobStore(settings.blob_url), fired=lambda _: supervisor.wake()))
    clockwork.start()
    try:
        with exported(metrics, settings.host, settings.metrics_port):
            # In steps, so that the end of the supervisor's own thread is noticed.
            while not stopping.wait(1.0) and supervisor.alive:
                pass
    finally:
        clockwork.stop()
        supervisor.stop()
        database.dispose()
    if not stopping.is_set():
        raise typer.Exit(1)
