"""Prometheus metrics: what the HTTP side counts itself, and what the database knows at the time of the scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from artifacts.errors import RankwiseError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_log = structlog.stdlib.get_logger(__name__)
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
            "rankwise_uploads_total", "Adapter uploads by outcome.", ("outcome",), registry=self.registry
        )
        self.jobs_submitted = Counter(
            "rankwise_jobs_submitted_total", "Jobs that were accepted, by kind.", ("kind",), registry=self.registry
        )

    def observe_service(
        self,
        queue: Callable[[], Mapping[str, int]],
        slots: Callable[[], Mapping[tuple[str, str], int]],
    ) -> None:
        """Export jobs by state and slots by (device, state), read at each scrape."""
        self.registry.register(_ServiceCollector(queue, slots))

    def render(self) -> bytes:
        """All metrics in the text exposition format."""
        return generate_latest(self.registry)


class _ServiceCollector(Collector):
    def __init__(
        self,
        queue: Callable[[], Mapping[str, int]],
        slots: Callable[[], Mapping[tuple[str, str], int]],
    ) -> None:
        self._queue, self._slots = queue, slots

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not open the database."""
        return ()

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("rankwise_database_up", "1 when the database answered this scrape.")
        try:
            queue, slots = self._queue(), self._slots()
        except RankwiseError as error:
            # The scrape must go on: that the database is down is what its reader wants to know.
            _log.warning("metrics_without_database", code=error.code, detail=error.detail)
            up.add_metric([], 0.0)
            yield up
            return
        up.add_metric([], 1.0)
        yield up
        jobs = GaugeMetricFamily("rankwise_jobs", "Jobs by state.", labels=("state",))
        for state, count in sorted(queue.items()):
            jobs.add_metric([state], count)
        yield jobs
        family = GaugeMetricFamily("rankwise_slots", "Device slots by device and state.", labels=("device", "state"))
        for (device, state), count in sorted(slots.items()):
            family.add_metric([device, state], count)
        yield family
