"""`/metrics` of a process that serves no other HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from prometheus_client import start_http_server

from app.metrics import Metrics

_log = structlog.stdlib.get_logger(__name__)


@contextmanager
def exported(metrics: Metrics, host: str, port: int) -> Iterator[None]:
    """Answer scrapes at `http://host:port/metrics`, without a key, inside the context; with port 0, nothing.

    Raises:
        OSError: another program listens there, or the host is not an address of this machine.
    """
    if port == 0:
        yield
        return
    server, thread = start_http_server(port, addr=host, registry=metrics.registry)
    _log.info("metrics_served", host=host, port=port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
