"""What this server's pool counts: claims, waits, runs and retries."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

# From a job that only copies a row to a training run of days; below a second the wait for a warm slot is told apart.
JOB_SECONDS = (
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    15.0,
    60.0,
    300.0,
    900.0,
    3600.0,
    14400.0,
    43200.0,
    86400.0,
    604800.0,
)
CLAIM_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class PoolMetrics:
    """A `workers.observer.PoolObserver` that counts into a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._waits = Histogram(
            "rankwise_job_wait_seconds",
            "Seconds for which a claimed job could have run and had to wait.",
            ("kind",),
            buckets=JOB_SECONDS,
            registry=registry,
        )
        self._runs = Histogram(
            "rankwise_job_run_seconds",
            "Seconds from the claim of an attempt to its end, by how it ended.",
            ("kind", "outcome"),
            buckets=JOB_SECONDS,
            registry=registry,
        )
        self._retries = Counter(
            "rankwise_job_retries_total",
            "Jobs that were queued again, by the code of the error that was the cause.",
            ("kind", "cause"),
            registry=registry,
        )
        self._claims = Histogram(
            "rankwise_claim_seconds",
            "Seconds that a claim, of any number of jobs, took the database.",
            buckets=CLAIM_SECONDS,
            registry=registry,
        )

    def claimed(self, kind: str, wait_seconds: float) -> None:
        self._waits.labels(kind).observe(wait_seconds)

    def claim_took(self, seconds: float) -> None:
        self._claims.observe(seconds)

    def ended(self, kind: str, outcome: str, run_seconds: float) -> None:
        self._runs.labels(kind, outcome).observe(run_seconds)

    def retried(self, kind: str, cause: str) -> None:
        self._retries.labels(kind, cause).inc()
