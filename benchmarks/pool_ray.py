"""A Ray cluster of one node with one slot, in a process of its own, and the provider on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.pool_service import ROOT
from workers.provider import WorkerProvider
from workers.ray_provider import RayProvider

HOST = "127.0.0.2"  # drivers replace 127.0.0.1 by an address of the network
STORE_BYTES = 80 * 1024**2


@contextmanager
def ray_provider(folder: Path) -> Iterator[WorkerProvider]:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    with (folder / "ray.log").open("wb") as log:
        node = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.pool_ray"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert node.stdout is not None
        address = node.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"Ray did not start:\n{(folder / 'ray.log').read_text(errors='replace')[-3000:]}")
        provider = RayProvider(address, work_dir=str(folder / "ray-node"))
        try:
            yield provider
        finally:
            provider.close()
            node.communicate(timeout=60)


def serve() -> None:
    """The node, until the standard input ends."""
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is not the address
    arguments = {
        "node_ip_address": HOST,
        "include_dashboard": False,
        "include_log_monitor": False,
        "object_store_memory": STORE_BYTES,
        "num_cpus": 1,
        "resources": {"rankwise_slot": 1},
        "no_monitor": True,
    }
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    print(cluster.address, file=answers)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    serve()
