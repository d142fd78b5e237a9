"""`rankwise serve` with POOL=ray over two nodes, with PostgreSQL and S3, used over HTTP as a user would."""

from __future__ import annotations

import io
import json
import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors import safe_open

from app.server_process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.postgres, pytest.mark.s3, pytest.mark.timeout(420)]

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
NODE = {"num_cpus": 1, "resources": {"rankwise_slot": 1}}
WAIT_SECONDS = 120.0


@pytest.fixture
def cluster(make_ray_cluster: Any) -> Any:
    """A head without slots and two nodes. They are given nothing of the database and the blob store."""
    quick_loss = {
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 1000,
        "health_check_timeout_ms": 10_000,
        "health_check_failure_threshold": 3,
    }
    return make_ray_cluster({"num_cpus": 0, "_system_config": quick_loss}, NODE, NODE)


@pytest.fixture
def node_folder(tmp_path: Path) -> Path:
    return tmp_path / "nodes"


@pytest.fixture
def service(
    cluster: Any, new_postgres: Callable[[], str], s3_bucket: str, tmp_path: Path, node_folder: Path
) -> Iterator[ServerProcess]:
    settings = {
        "POOL": "ray",
        "RAY_ADDRESS": cluster.address,
        "RAY_WORK_DIR": str(node_folder),
        "DATABASE_URL": new_postgres(),
        "BLOB_URL": f"s3://{s3_bucket}/rankwise",
        "BEAT_SECONDS": "1",
        "LEASE_SECONDS": "30",
        "MAX_WAIT_SECONDS": str(WAIT_SECONDS),
    }
    log = tmp_path / "server.log"
    with ServerProcess(tmp_path / "data", settings, log) as server:
        yield server
    assert "test-secret" not in log.read_text()


@pytest.fixture
def client(service: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=WAIT_SECONDS + 30, trust_env=False) as client:
        yield client


def upload(client: httpx.Client, name: str) -> str:
    files = [("file", (path.name, path.read_bytes())) for path in (EXAMPLES / name).iterdir()]
    answer = client.post("/adapters", files=files, data={"name": name})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def slots(client: httpx.Client) -> list[dict[str, Any]]:
    (server,) = client.get("/workers").json()["items"]
    assert server["pool"] == "ray"
    return [slot for slot in server["slots"] if slot["state"] != "starting"]


def merge(client: httpx.Client, adapters: list[str], rank: int, **headers: str) -> dict[str, Any]:
    body = {"adapters": [{"id": item} for item in adapters], "method": "lego", "parameters": {"rank": rank}}
    answer = client.post("/merge", json=body, headers=headers)
    assert answer.status_code in (200, 202), answer.text
    job: dict[str, Any] = answer.json()
    return job


def attempts(client: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = client.get(f"/jobs/{job_id}/attempts").json()["items"]
    return items


def running_jobs(client: httpx.Client) -> list[str]:
    return [slot["job_id"] for slot in slots(client) if slot["job_id"] and slot["state"] == "running"]


def test_merges_run_on_two_nodes_and_a_lost_node_costs_no_job(
    client: httpx.Client, cluster: Any, wait_until: Any, has_ended: Any, node_folder: Path
) -> None:
    adapters = [upload(client, name) for name in ("dates", "logs")]
    wait_until(lambda: len(slots(client)) == 2, "both nodes have a worker", WAIT_SECONDS)
    workers = {slot["host"]: slot["pid"] for slot in slots(client)}
    assert len(workers) == 2
    # Held until both have a job, so that neither node does all the work.
    for pid in workers.values():
        os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(merge, client, adapters, rank, Prefer="wait=110") for rank in (6, 12)]
        wait_until(lambda: len(set(running_jobs(client))) == 2, "both jobs run", WAIT_SECONDS)
        for pid in workers.values():
            os.kill(pid, signal.SIGCONT)
        jobs = [item.result() for item in asked]
    assert [job["state"] for job in jobs] == ["succeeded", "succeeded"], jobs
    used = [attempts(client, job["id"])[0]["slot"].partition("@")[2] for job in jobs]
    assert sorted(used) == sorted(workers)
    for job in jobs:
        (merged,) = job["result"]["adapters"]
        check_adapter(client.get(f"/adapters/{merged}/download").content, node_folder.parent / merged)
    assert len({job["result"]["adapters"][0] for job in jobs}) == 2, "another rank, another adapter"

    wait_until(lambda: all(slot["state"] == "idle" for slot in slots(client)), "both slots are idle")
    workers = {slot["host"]: slot["pid"] for slot in slots(client)}
    for pid in workers.values():
        os.kill(pid, signal.SIGSTOP)
    job_id = merge(client, adapters, 9)["id"]
    wait_until(lambda: running_jobs(client) == [job_id], "the job runs", WAIT_SECONDS)
    (lost,) = [slot["host"] for slot in slots(client) if slot["job_id"] == job_id]
    family = psutil.Process(workers[lost]).parents()[:2]  # its fork server, and the actor
    (number,) = [number for number, node in enumerate(cluster.nodes) if node.startswith(lost)]
    assert cluster.lose(number) == []
    (other,) = set(workers) - {lost}
    os.kill(workers[other], signal.SIGCONT)
    wait_until(lambda: client.get(f"/jobs/{job_id}").json()["state"] == "succeeded", "the job succeeds", WAIT_SECONDS)
    first, second = attempts(client, job_id)
    assert (first["slot"].partition("@")[2], second["slot"].partition("@")[2]) == (lost, other)
    assert client.get(f"/jobs/{job_id}").json()["attempt"] == 2
    wait_until(lambda: [slot["host"] for slot in slots(client)] == [other], "the lost node's slot is gone")
    wait_until(lambda: all(has_ended(p) for p in (workers[lost], *(p.pid for p in family))), "its processes are gone")
    assert client.get("/readyz").status_code == 200


def check_adapter(archive: bytes, folder: Path) -> None:
    """A PEFT directory whose tensors can be read."""
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        packed.extractall(folder)
    (config,) = folder.rglob("adapter_config.json")
    assert json.loads(config.read_text())["peft_type"] == "LORA"
    with safe_open(config.parent / "adapter_model.safetensors", "pt") as tensors:
        assert all(tensors.get_tensor(key).isfinite().all() for key in tensors.keys())  # noqa: SIM118 - no mapping
