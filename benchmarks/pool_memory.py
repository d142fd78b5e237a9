"""What an idle service keeps in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil

from benchmarks.pool_figures import Figure
from benchmarks.pool_service import database_url, scratch_folder, service

MEMORY_GOAL_MB = 700.0
SETTLING_SECONDS = 3.0


def idle_memory() -> list[Figure]:
    """`rankwise serve` with one worker that has torch loaded: the proportional set size of the process and all below.

    A page that several processes share counts once.
    """
    with scratch_folder() as folder, database_url("sqlite", folder) as url:
        settings = {"DEVICES": "cpu:1", "BLOB_URL": (folder / "blobs").as_uri()}
        with service(folder, url, settings, ("app.cli", "serve")) as (_, pid):
            time.sleep(SETTLING_SECONDS)
            parts = list(_parts(psutil.Process(pid)))
    total = sum(megabytes for _, megabytes in parts)
    figures = [Figure("idle service, PSS", total, "MB", MEMORY_GOAL_MB)]
    return figures + [Figure(f"  {role}", megabytes, "MB") for role, megabytes in parts]


def _parts(server: psutil.Process) -> Iterator[tuple[str, float]]:
    yield "API and supervisor", _pss(server)
    for forkserver in server.children():
        yield "fork server", _pss(forkserver)
        for worker in forkserver.children(recursive=True):
            yield "worker", _pss(worker)


def _pss(process: psutil.Process) -> float:
    return float(process.memory_full_info().pss) / 1e6
