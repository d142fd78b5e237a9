"""What /metrics exports, and what it does when something is away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from app.exporter import exported
from app.metrics import Metrics
from app.pool_metrics import PoolMetrics
from app.service_metrics import Remembered, ServiceCollector
from artifacts.errors import DatabaseUnavailable
from storage.figures import Figures, StoredFigures
from workers.observer import PoolObserver

FIGURES = Figures(
    queued=3,
    running=2,
    owners_waiting=2,
    servers=1,
    slots={("cpu", "idle"): 1, ("cuda:0", "running"): 2},
    busy_seconds={("srv_1", "cuda:0"): 12.5},
    lease_age=7.0,
    queue_age=8.0,
    schedule_lag=9.0,
    delivery_lag=10.0,
)
STORED = StoredFigures(4, 5000, 600, {"pending": 1, "delivered": 2, "failed": 3})


def lines_of(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]


def test_the_figures_of_the_service() -> None:
    registry = CollectorRegistry()
    registry.register(ServiceCollector(lambda: FIGURES, lambda: STORED))
    assert lines_of(registry) == [
        "rankwise_database_up 1.0",
        'rankwise_jobs{state="queued"} 3.0',
        'rankwise_jobs{state="running"} 2.0',
        "rankwise_queue_owners 2.0",
        "rankwise_servers 1.0",
        'rankwise_slots{device="cpu",state="idle"} 1.0',
        'rankwise_slots{device="cuda:0",state="running"} 2.0',
        'rankwise_slot_busy_seconds_total{device="cuda:0",server="srv_1"} 12.5',
        "rankwise_oldest_lease_seconds 7.0",
        "rankwise_oldest_queued_seconds 8.0",
        "rankwise_schedule_lag_seconds 9.0",
        "rankwise_webhook_lag_seconds 10.0",
        "rankwise_blobs 4.0",
        "rankwise_blob_bytes 5000.0",
        "rankwise_job_log_bytes 600.0",
        'rankwise_webhook_deliveries{state="delivered"} 2.0',
        'rankwise_webhook_deliveries{state="failed"} 3.0',
        'rankwise_webhook_deliveries{state="pending"} 1.0',
    ]


def test_a_scrape_without_a_database_says_so(server: Any) -> None:
    server.client.get("/healthz")
    path = server.services.database.path
    away = path.with_suffix(".away")
    path.rename(away)
    response = server.client.get("/metrics")
    away.rename(path)
    assert response.status_code == 200
    lines = response.text.splitlines()
    assert "rankwise_database_up 0.0" in lines
    assert not any(line.startswith("rankwise_jobs{") for line in lines)
    assert any(line.startswith("rankwise_http_requests_total{") for line in lines)
    assert "rankwise_database_up 1.0" in server.client.get("/metrics").text


def test_what_the_pool_counts() -> None:
    registry = CollectorRegistry()
    pool: PoolObserver = PoolMetrics(registry)
    pool.claimed("merge", 0.07)
    pool.claimed("merge", 3 * 86400.0)
    pool.claim_took(0.004)
    pool.ended("merge", "succeeded", 0.04)
    pool.ended("merge", "queued", 5000.0)
    pool.retried("merge", "worker_crashed")
    lines = lines_of(registry)
    for expected in (
        'rankwise_job_wait_seconds_bucket{kind="merge",le="0.05"} 0.0',
        'rankwise_job_wait_seconds_bucket{kind="merge",le="0.1"} 1.0',
        'rankwise_job_wait_seconds_bucket{kind="merge",le="604800.0"} 2.0',
        'rankwise_job_run_seconds_bucket{kind="merge",le="0.05",outcome="succeeded"} 1.0',
        'rankwise_job_run_seconds_count{kind="merge",outcome="queued"} 1.0',
        'rankwise_job_retries_total{cause="worker_crashed",kind="merge"} 1.0',
        'rankwise_claim_seconds_bucket{le="0.005"} 1.0',
        "rankwise_claim_seconds_count 1.0",
    ):
        assert expected in lines


class Source:
    """Gives 1, 2, 3, … and can be held up."""

    def __init__(self) -> None:
        self.asked = 0
        self.fails = False
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self) -> int:
        self.entered.set()
        assert self.go_on.wait(30)
        if self.fails:
            raise DatabaseUnavailable("away")
        self.asked += 1
        return self.asked


def test_a_remembered_value_is_asked_for_again_when_it_is_old() -> None:
    source = Source()
    lasting, fleeting = Remembered(source, 1000.0), Remembered(source, 0.0)
    assert (lasting(), lasting(), fleeting(), fleeting(), lasting()) == (1, 1, 2, 3, 1)


def test_a_failure_is_not_remembered() -> None:
    source = Source()
    value = Remembered(source, 0.0)
    source.fails = True
    with pytest.raises(DatabaseUnavailable):
        value()
    source.fails = False
    assert value() == 1
    source.fails = True
    with pytest.raises(DatabaseUnavailable):
        value()


def in_thread(call: Callable[[], int]) -> tuple[threading.Thread, list[int]]:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    return thread, found


def test_nobody_waits_for_a_value_that_another_one_computes() -> None:
    source = Source()
    value = Remembered(source, 0.0)
    assert value() == 1
    source.go_on.clear()
    source.entered.clear()
    thread, found = in_thread(value)
    assert source.entered.wait(30)
    assert value() == 1
    source.go_on.set()
    thread.join(30)
    assert found == [2]


def test_the_walks_through_whole_tables_are_not_made_at_every_scrape() -> None:
    asked: list[None] = []

    def stored() -> StoredFigures:
        asked.append(None)
        return STORED

    metrics = Metrics()
    metrics.observe_service(lambda: FIGURES, stored)
    for _ in range(3):
        assert b"rankwise_blob_bytes 5000.0" in metrics.render()
    assert len(asked) == 1


def test_a_process_without_http_exports_on_a_port_of_its_own(free_port: int) -> None:
    metrics = Metrics()
    metrics.pool.claimed("merge", 1.0)
    with exported(metrics, "127.0.0.1", free_port), httpx.Client(trust_env=False) as client:
        text = client.get(f"http://127.0.0.1:{free_port}/metrics").text
        assert 'rankwise_job_wait_seconds_count{kind="merge"} 1.0' in text
        with pytest.raises(OSError, match="in use"), exported(metrics, "127.0.0.1", free_port):
            pass
    with pytest.raises(httpx.ConnectError), httpx.Client(trust_env=False) as client:
        client.get(f"http://127.0.0.1:{free_port}/metrics")
    with exported(metrics, "127.0.0.1", 0):
        pass


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
