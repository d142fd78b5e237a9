"""Fixtures: a small Ray cluster on loopback for a module of tests, and providers on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pool_harness import wait_until

from workers.ray_provider import RayProvider
from workers.ray_slots import SlotRules

PROGRAM = Path(__file__).parent / "ray_nodes.py"


class RayCluster:
    """A cluster that `ray_nodes` runs in a process of its own. Its nodes can import what lies beside this file."""

    def __init__(self, log: Path, *nodes: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        python_path = os.pathsep.join([str(PROGRAM.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps({"nodes": nodes})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
            env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", **(environment or {})},
        )
        self.about = self._answer()
        self.address: str = self.about["address"]

    @property
    def nodes(self) -> list[str]:
        """The ids of the nodes that were ever there, by their numbers."""
        ids: list[str] = self.about["nodes"]
        return ids

    def lose(self, number: int) -> list[str]:
        """Kill the raylet of a node; returns the processes that did not end with it."""
        left: list[str] = self._ask(lose=number)["left"]
        return left

    def add(self, **arguments: Any) -> None:
        self.about = self._ask(add=arguments)

    def stop(self) -> list[str]:
        """End it; returns the processes that are left."""
        if self._process.poll() is not None:
            self._log.close()
            return [f"the cluster's own process ended before with {self._process.returncode}"]
        left: list[str] = self._ask(stop=True)["left"]
        with self._process as process:
            assert process.wait(30) == 0
        self._log.close()
        return left

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(30)
            pytest.fail(f"the cluster ended:\n{Path(self._log.name).read_text(errors='replace')[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@pytest.fixture
def make_ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RayCluster]]:
    """Starts clusters, which end when the tests that use them have ended."""
    made = []

    def make(*nodes: dict[str, Any], environment: dict[str, str] | None = None) -> RayCluster:
        made.append(RayCluster(tmp_path_factory.mktemp("ray") / "cluster.log", *nodes, environment=environment))
        return made[-1]

    yield make
    assert [left for cluster in made for left in cluster.stop()] == []


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """One node with two slots."""
    log = tmp_path_factory.mktemp("ray") / "cluster.log"
    cluster = RayCluster(log, {"num_cpus": 2, "resources": {"rankwise_slot": 2}})
    yield cluster
    assert cluster.stop() == []


@pytest.fixture(scope="module")
def ray_work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that actors work in."""
    return tmp_path_factory.mktemp("ray-node")


@pytest.fixture
def make_ray_provider(request: pytest.FixtureRequest, ray_work_dir: Path) -> Iterator[Callable[..., RayProvider]]:
    """Makes providers, without torch as the local one of these tests, on the shared cluster or another one."""
    made = []

    def make(address: str | None = None) -> RayProvider:
        if address is None:
            address = request.getfixturevalue("ray_cluster").address
        made.append(RayProvider(address, SlotRules(), work_dir=str(ray_work_dir), preload=("workers.runtime",)))
        return made[-1]

    yield make
    for provider in made:
        provider.close()


@pytest.fixture(scope="module")
def ray_provider(ray_cluster: RayCluster, ray_work_dir: Path) -> Iterator[RayProvider]:
    """A provider that tests share."""
    provider = RayProvider(ray_cluster.address, work_dir=str(ray_work_dir), preload=("workers.runtime",))
    wait_until(provider.slots, "the cluster's slots are known")
    yield provider
    provider.close()
