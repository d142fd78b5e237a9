"""Prometheus metrics: what the HTTP side counts itself, and what the database knows at the time of the scrape."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from app.pool_metrics import PoolMetrics
from app.service_metrics import ServiceCollector
from storage.figures import Figures, StoredFigures

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
disable_created_metrics()  # type: ignore[no-untyped-call]
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The instruments of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rankwise_http_requests_total",
            "HTTP requests by method, route template and status.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "rankwise_http_request_seconds",
            "Seconds from the first byte of a request to the last byte of its answer.",
            ("method", "route"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.requests_open = Gauge(
            "rankwise_http_requests_open", "HTTP requests that are being answered.", registry=self.registry
        )
        self.upload_bytes = Counter(
            "rankwise_upload_bytes_total", "Bytes of uploaded files that were staged.", registry=self.registry
        )
        self.uploads = Counter(
            "rankwise_uploads_total",
            "Uploads of adapters and datasets by outcome.",
            ("outcome",),
            registry=self.registry,
        )
        self.jobs_submitted = Counter(
            "rankwise_jobs_submitted_total", "Jobs that were accepted, by kind.", ("kind",), registry=self.registry
        )
        self.pool = PoolMetrics(self.registry)

    def observe_service(self, figures: Callable[[], Figures], stored: Callable[[], StoredFigures]) -> None:
        """Export what the database knows, read at each scrape; `stored` at most once a minute."""
        self.registry.register(ServiceCollector(figures, stored))

    def render(self) -> bytes:
        """All metrics in the text exposition format."""
        return generate_latest(self.registry)
