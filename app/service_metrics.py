"""The metrics that are read from the database at a scrape: they tell of all servers, whichever one is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from artifacts.errors import RankwiseError
from storage.figures import Figures, StoredFigures

STORED_SECONDS = 60.0
"""For so long, what takes a walk through whole tables is not asked for again."""

Value = TypeVar("Value")
_log = structlog.stdlib.get_logger(__name__)


class Remembered(Generic[Value]):
    """A value that is computed anew when it is asked for and the last one is older than `seconds`.

    While one thread computes it the others get the last one; an error is raised and not remembered.
    """

    def __init__(self, compute: Callable[[], Value], seconds: float) -> None:
        self._compute = compute
        self._seconds = seconds
        self._lock = threading.Lock()
        self._last: tuple[float, Value] | None = None

    def __call__(self) -> Value:
        last = self._last
        if last is not None and (time.monotonic() - last[0] < self._seconds or self._lock.locked()):
            return last[1]
        with self._lock:
            if self._last is not None and self._last is not last:
                return self._last[1]  # another thread has just computed it
            value = self._compute()
            self._last = (time.monotonic(), value)
            return value


class ServiceCollector(Collector):
    """Args: what gives the figures; both may raise RankwiseError while the database is away."""

    def __init__(self, figures: Callable[[], Figures], stored: Callable[[], StoredFigures]) -> None:
        self._figures = figures
        self._stored = Remembered(stored, STORED_SECONDS)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not open the database."""
        return ()

    def collect(self) -> Iterator[Metric]:
        try:
            figures, stored = self._figures(), self._stored()
        except RankwiseError as error:
            # The scrape must go on: that the database is down is what its reader wants to know.
            _log.warning("metrics_without_database", code=error.code, detail=error.detail)
            yield _gauge("rankwise_database_up", _UP, 0.0)
            return
        yield _gauge("rankwise_database_up", _UP, 1.0)
        yield from _pool(figures)
        yield from _ages(figures)
        yield from _store(stored)


_UP = "1 when the database answered this scrape."


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=value)


def _pool(figures: Figures) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("rankwise_jobs", "Jobs that wait (queued) or hold slots (running).", labels=("state",))
    jobs.add_metric(["queued"], figures.queued)
    jobs.add_metric(["running"], figures.running)
    yield jobs
    yield _gauge("rankwise_queue_owners", "API keys that have jobs waiting.", figures.owners_waiting)
    yield _gauge("rankwise_servers", "Servers with a pool that gave a sign of life within a lease.", figures.servers)
    slots = GaugeMetricFamily("rankwise_slots", "Device slots by device and state.", labels=("device", "state"))
    for (device, state), count in sorted(figures.slots.items()):
        slots.add_metric([device, state], count)
    yield slots
    busy = CounterMetricFamily(
        "rankwise_slot_busy_seconds",
        "Seconds for which slots have been held by attempts, since their server was started.",
        labels=("server", "device"),
    )
    for (server, device), seconds in sorted(figures.busy_seconds.items()):
        busy.add_metric([server, device], seconds)
    yield busy


def _ages(figures: Figures) -> Iterator[Metric]:
    yield _gauge(
        "rankwise_oldest_lease_seconds",
        "Seconds since the last renewal of the active lease that was renewed longest ago.",
        figures.lease_age,
    )
    yield _gauge("rankwise_oldest_queued_seconds", "Age of the oldest job that waits.", figures.queue_age)
    yield _gauge(
        "rankwise_schedule_lag_seconds",
        "Seconds since the earliest schedule that has not fired yet was due.",
        figures.schedule_lag,
    )
    yield _gauge(
        "rankwise_webhook_lag_seconds",
        "Seconds since the earliest webhook delivery that is still to be tried was due.",
        figures.delivery_lag,
    )


def _store(stored: StoredFigures) -> Iterator[Metric]:
    yield _gauge("rankwise_blobs", "Blobs that the database knows.", stored.blobs)
    yield _gauge("rankwise_blob_bytes", "Their size together.", stored.blob_bytes)
    yield _gauge(
        "rankwise_job_log_bytes", "Size of the log pieces in the database, of attempts that run.", stored.live_log_size
    )
    deliveries = GaugeMetricFamily(
        "rankwise_webhook_deliveries", "Webhook deliveries on record, by state.", labels=("state",)
    )
    for state, count in sorted(stored.deliveries.items()):
        deliveries.add_metric([state], count)
    yield deliveries
