"""Whether a claim and the lists stay quick when the tables have grown."""

from __future__ import annotations

import gc
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from sqlalchemy.orm import Session

from benchmarks import pool_rows
from benchmarks.pool_figures import Figure, median, percentile
from benchmarks.pool_rows import Sizes
from benchmarks.pool_service import database_url, migrated, scratch_folder
from storage import adapters, claims, jobs, models
from storage.adapters import AdapterFilter
from storage.claims import SlotOffer
from storage.database import Database
from storage.jobs import JobFilter
from storage.pagination import cursor_at

CLAIM_GOAL = 3.0
LIST_GOAL_MS = 50.0
CLAIMS = 200
WARM_UP = 5
SMALL = Sizes(adapters=1, finished_jobs=1, queued_jobs=2 * CLAIMS)
LIMITS = (50, 200)


def growth(kind: str, sizes: Sizes, rounds: int) -> list[Figure]:
    """Compare almost empty tables with full ones.

    Args:
        kind: "sqlite" or "postgresql".
        rounds: how often each list is asked for, with each limit: first pages and pages in the middle.
    """
    with scratch_folder() as folder, database_url(kind, folder, durable=False) as url, migrated(url) as database:
        pool_rows.load(database, SMALL)
        small = claim_times(database, CLAIMS)
    with scratch_folder() as folder, database_url(kind, folder, durable=False) as url, migrated(url) as database:
        began = time.monotonic()
        pool_rows.load(database, sizes)
        loading = time.monotonic() - began
        large = claim_times(database, min(CLAIMS, sizes.queued_jobs - WARM_UP))
        times = list_times(database, sizes, rounds)
    every = [value for values in times.values() for value in values]
    slowest = sorted(((percentile(values, 0.99), name) for name, values in times.items()), reverse=True)[:10]
    detail = {"adapters": sizes.adapters, "finished_jobs": sizes.finished_jobs, "queued_jobs": sizes.queued_jobs}
    return [
        Figure(
            f"claim, full / empty tables, {kind}",
            median(large) / median(small),
            "×",
            CLAIM_GOAL,
            detail=detail
            | {"empty_ms": median(small), "full_ms": median(large), "full_p99_ms": percentile(large, 0.99)},
        ),
        Figure(
            f"lists, p99 of {len(every)} calls, {kind}",
            percentile(every, 0.99),
            "ms",
            LIST_GOAL_MS,
            detail=detail | {"median_ms": median(every), "slowest_p99_ms": {name: value for value, name in slowest}},
        ),
        Figure(f"slowest list ({slowest[0][1]}), p99, {kind}", slowest[0][0], "ms"),
        Figure(f"claim from full tables, median, {kind}", median(large), "ms"),
        Figure(f"loading, {kind}", loading, "s"),
    ]


def claim_times(database: Database, count: int) -> list[float]:
    """Milliseconds of whole claim transactions, each of one job for one slot; the jobs end in between, unmeasured."""
    times: list[float] = []
    for _ in range(WARM_UP + count):
        began = time.perf_counter()
        with database.write() as session:
            found = claims.claim_many(
                session,
                server_id="srv_growth",
                boot_id="run_growth",
                slots=[SlotOffer("cpu:0", "host", pid=1)],
                lease_seconds=60.0,
            )
        times.append((time.perf_counter() - began) * 1e3)
        (claim,) = found.claims
        with database.write() as session:
            claims.finish_succeeded(session, claim.job_id, claim.attempt, {"adapters": [], "images": [], "report": {}})
    return times[WARM_UP:]


def adapter_filters(total: int) -> dict[str, AdapterFilter]:
    """Every filter, alone and together: values that most adapters have, few, and none."""
    some = pool_rows.digest("file", total // 3)
    return {
        "all adapters": AdapterFilter(),
        "common base model": AdapterFilter(base_model="org-0/base-000"),
        "rare base model": AdapterFilter(base_model="org-12/base-199"),
        "unknown base model": AdapterFilter(base_model="nobody/nothing"),
        "registered model": AdapterFilter(base_model=pool_rows.MODELS[0]),
        "common method": AdapterFilter(method="lora"),
        "rare method": AdapterFilter(method="loftq"),
        "unknown method": AdapterFilter(method="none"),
        "common tag": AdapterFilter(tag="tag-000"),
        "rare tag": AdapterFilter(tag="tag-499"),
        "unknown tag": AdapterFilter(tag="none"),
        "name, one letter": AdapterFilter(name="a"),
        "name, one word": AdapterFilter(name="CASTLE"),
        "name, two words": AdapterFilter(name="castle-noir"),
        "name, digits": AdapterFilter(name="777"),
        "name, one adapter": AdapterFilter(name=f"{total // 2:07d}"),
        "name, unknown": AdapterFilter(name="zzzqqq"),
        "name, unknown letter": AdapterFilter(name="ж"),
        "name, two letters": AdapterFilter(name="ju"),
        "name, unknown two letters": AdapterFilter(name="qz"),
        "file": AdapterFilter(sha256=some),
        "AutoV2": AdapterFilter(sha256=some[:10]),
        "file of many": AdapterFilter(sha256=pool_rows.config_digest(1)),
        "AutoV2 of many": AdapterFilter(sha256=pool_rows.config_digest(1)[:10]),
        "weights": AdapterFilter(sha256=pool_rows.digest("weights", total // 4)),
        "unknown digest": AdapterFilter(sha256="0" * 64),
        "base model, method": AdapterFilter(base_model="org-0/base-000", method="rslora"),
        "rare base model, method": AdapterFilter(base_model="org-12/base-199", method="pissa"),
        "tag, method": AdapterFilter(tag="tag-010", method="dora"),
        "tag, base model": AdapterFilter(tag="tag-010", base_model="org-3/base-003"),
        "rare tag, base model": AdapterFilter(tag="tag-200", base_model="org-15/base-100"),
        "tag, name": AdapterFilter(tag="tag-000", name="noir"),
        "method, name": AdapterFilter(method="dora", name="castle-pixel"),
        "method, rare name": AdapterFilter(method="lora", name=f"{total // 2:07d}"),
        "tag, base model, name": AdapterFilter(tag="tag-001", base_model="org-1/base-001", name="amber"),
        "all five": AdapterFilter("org-0/base-000", "lora", "tag-000", "a", pool_rows.config_digest(1)),
    }


JOB_FILTERS = {
    "all jobs": JobFilter(),
    "kind": JobFilter(kind="train"),
    "unknown kind": JobFilter(kind="none"),
    "queued": JobFilter(state="queued"),
    "running": JobFilter(state="running"),
    "succeeded": JobFilter(state="succeeded"),
    "cancelled": JobFilter(state="cancelled"),
    "kind, state": JobFilter(kind="merge", state="failed"),
}


def list_times(database: Database, sizes: Sizes, rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Milliseconds of the calls of each list, from the call to the rows in memory."""
    times: dict[str, list[float]] = defaultdict(list)
    choice = random.Random(seed)
    gc.collect()
    gc.freeze()  # as `rankwise serve` does: else every thirtieth call pays for a full collection
    for name, call in _lists(sizes, choice):
        for number in range(rounds + 1):
            began = time.perf_counter()
            with database.read() as session:
                call(session, number)
            if number > 0:  # the first one reads the pages of this index from the disk
                times[name].append((time.perf_counter() - began) * 1e3)
    return times


Call = Callable[[Session, int], Any]


def _lists(sizes: Sizes, choice: random.Random) -> Iterator[tuple[str, Call]]:
    for limit in LIMITS:
        for name, adapter_filter in adapter_filters(sizes.adapters).items():
            yield f"{name} ({limit})", _adapter_call(adapter_filter, limit, sizes.adapters, choice)
        for name, job_filter in JOB_FILTERS.items():
            yield f"{name} ({limit})", _job_call(job_filter, limit, sizes, choice)
        yield f"models ({limit})", _model_call(limit)


def _adapter_call(chosen: AdapterFilter, limit: int, total: int, choice: random.Random) -> Call:
    def call(session: Session, number: int) -> Any:
        return adapters.list_adapters(session, chosen, _cursor("adp", asdict(chosen), total, choice, number), limit)

    return call


def _job_call(chosen: JobFilter, limit: int, sizes: Sizes, choice: random.Random) -> Call:
    total = sizes.finished_jobs + sizes.queued_jobs

    def call(session: Session, number: int) -> Any:
        return jobs.list_jobs(session, chosen, _cursor("job", asdict(chosen), total, choice, number), limit)

    return call


def _model_call(limit: int) -> Call:
    return lambda session, _number: models.list_models(session, None, limit)


def _cursor(prefix: str, filters: dict[str, Any], total: int, choice: random.Random, number: int) -> str | None:
    """Every third time the first page, else one that begins anywhere."""
    if number % 3 == 0:
        return None
    place = choice.randrange(total)
    made = pool_rows.START + timedelta(seconds=2 * place, microseconds=place % 1000)
    return cursor_at((made, pool_rows.identifier(prefix, place)), filters)
