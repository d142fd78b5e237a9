"""The fork server of the local provider: what it loads, and how death follows from parent to child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import psutil
from structlog.testing import capture_logs

from workers.local import PRELOAD, LocalProvider
from workers.provider import Slot

SLOT = Slot("cpu:0", "cpu")


def nothing() -> None:
    """A `notify` for tests that poll."""


def test_importing_the_pool_imports_no_torch() -> None:
    program = (
        "import sys, workers.supervisor, workers.provider, workers.local, workers.devices; "
        "workers.devices.parse_devices('auto'); "
        "print([name for name in ('torch', 'transformers', 'sklearn', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_workers_have_torch_loaded_and_cuda_untouched(pool: Any) -> None:
    assert "torch" in PRELOAD
    provider = LocalProvider(threads=1)
    pool.provider = provider
    job_id = pool.submit("loaded")
    with capture_logs() as logs:
        supervisor = pool.start()
        job = pool.ended(job_id)
        supervisor.stop()
    provider.close()
    assert not [entry for entry in logs if entry["event"] == "preload_failed"]
    assert job.result["report"] == {"cuda_initialized": False, "bad_fork": False, "threads": 1, "sum": 1000.0}


def test_a_module_that_can_not_be_preloaded_is_told_and_the_others_are_loaded(wait_until: Any) -> None:
    provider = LocalProvider(preload=("no_such_module", "workers.runtime"))
    with capture_logs() as logs:
        worker = provider.start([SLOT], nothing)
        wait_until(lambda: worker.ready, "the worker is ready")
    provider.close()
    (failure,) = [entry for entry in logs if entry["event"] == "preload_failed"]
    assert failure["module"] == "no_such_module"
    assert "ModuleNotFoundError" in failure["traceback"]


def test_closing_leaves_no_process_and_no_thread(wait_until: Any, exists: Any) -> None:
    threads = threading.active_count()
    provider = LocalProvider(preload=("workers.runtime",))
    workers = [provider.start([SLOT], nothing) for _ in range(2)]
    wait_until(lambda: all(worker.ready for worker in workers), "the workers are ready")
    # Not whatever this process has started: a cluster that other tests use may start processes at any time.
    fork_server = psutil.Process(workers[0].pid).parent()
    assert fork_server is not None
    started = [fork_server, *fork_server.children(recursive=True)]
    assert len(started) == 4  # the fork server, its guardian and the workers
    provider.close()
    assert not any(exists(process.pid) for process in started)
    assert not any(worker.alive() for worker in workers)
    assert threading.active_count() == threads


def test_workers_die_with_the_fork_server_and_the_next_start_makes_a_new_one(wait_until: Any, exists: Any) -> None:
    provider = LocalProvider(preload=("workers.runtime",))
    worker = provider.start([SLOT], nothing)
    wait_until(lambda: worker.ready, "the worker is ready")
    assert worker.pid is not None
    os.kill(psutil.Process(worker.pid).ppid(), signal.SIGKILL)
    wait_until(lambda: not worker.alive(), "the worker is told to be dead")
    assert not exists(worker.pid)
    assert worker.exit()["signal"] == signal.SIGKILL
    second = provider.start([SLOT], nothing)
    wait_until(lambda: second.ready, "another worker is ready")
    provider.close()


def test_the_kernel_kills_a_worker_whose_fork_server_dies(wait_until: Any, has_ended: Any) -> None:
    """Without the provider's help: its event thread is told nothing until the worker is dead."""
    provider = LocalProvider(preload=("workers.runtime",))
    worker = provider.start([SLOT], nothing)
    wait_until(lambda: worker.ready, "the worker is ready")
    assert worker.pid is not None
    forkserver = provider._forkserver
    assert forkserver is not None
    blocked = threading.Event()
    forkserver._bury, bury = blocked.wait, forkserver._bury  # type: ignore[method-assign, assignment]
    try:
        os.kill(forkserver.pid, signal.SIGKILL)
        wait_until(lambda: has_ended(worker.pid), "the kernel kills the worker")
    finally:
        blocked.set()
    bury()
    provider._forkserver = None


def test_the_fork_server_outlives_a_signal_to_the_whole_service(wait_until: Any) -> None:
    provider = LocalProvider(preload=("workers.runtime",))
    worker = provider.start([SLOT], nothing)
    wait_until(lambda: worker.ready, "the worker is ready")
    assert provider._forkserver is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(provider._forkserver.pid, number)
    second = provider.start([SLOT], nothing)
    wait_until(lambda: second.ready, "it still forks")
    assert worker.alive()
    provider.close()
