"""A federated training with a remote client, as processes: the service, which is killed, and `rankwise federate`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

from tiny_base import sums, write_rows, write_tiny_base

from storage import keys
from storage.database import Database

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parent.parent.parent
CLIENTS = 3


class Service:
    """`rankwise serve` with keys, on one address all the time, whatever becomes of its process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.settings = {
            "RANKWISE_PORT": str(port),
            "RANKWISE_DATA_DIR": str(folder / "data"),
            "RANKWISE_MODEL_ROOTS": str(folder / "roots"),
            "RANKWISE_DEVICES": "cpu:2",
            "RANKWISE_API_KEYS": "on",
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        self.log = folder / "server.log"
        self.start()
        database = Database(f"sqlite:///{folder / 'data' / 'rankwise.db'}")
        with database.write() as session:
            _, self.admin = keys.create_key(session, "admin", ["admin"])
            row, self.secret = keys.create_key(session, "site", ["client"])
            self.key = row.id
        database.dispose()
        self.http = httpx.Client(
            base_url=self.url, timeout=60, trust_env=False, headers={"Authorization": f"Bearer {self.admin}"}
        )

    def spawn(self, *arguments: str, **settings: str) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RANKWISE_")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **settings}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", *arguments],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if arguments[0] == "federate" else log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def start(self) -> None:
        self.server = self.spawn("serve", **self.settings)

        def is_ready() -> bool:
            try:
                return httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        self.until(is_ready, "the service is ready")

    def kill(self) -> None:
        """`kill -9` of the service and all that it started."""
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()

    def federate(self, job: str, data: Path) -> subprocess.Popen[bytes]:
        return self.spawn(
            *("federate", job, "--client", "2", "--base-model", str(self.folder / "roots" / "tiny")),
            *("--data", str(data), "--poll", "0.2", "--json"),
            RANKWISE_SERVER=self.url,
            RANKWISE_API_KEY=self.secret,
        )

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 240) -> Any:
        deadline, pause = time.monotonic() + seconds, threading.Event()
        while not (found := condition()):
            assert time.monotonic() < deadline, what
            pause.wait(0.05)
        return found

    def post(self, path: str, **options: Any) -> dict[str, Any]:
        answer = self.http.post(path, **options)
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def ended(self, job: str) -> dict[str, Any]:
        found: dict[str, Any] = self.until(
            lambda: (seen := self.http.get(f"/jobs/{job}").json())["finished_at"] and seen, f"{job} ends"
        )
        return found

    def digest(self, job: dict[str, Any]) -> str:
        found: str = self.http.get(f"/adapters/{job['result']['adapters'][0]}").json()["weights_digest"]
        return found


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    write_tiny_base(tmp_path / "roots" / "tiny")
    found = Service(tmp_path)
    yield found
    found.http.close()
    for process in found.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_a_remote_client_takes_part_although_the_service_is_killed(service: Service, tmp_path: Path) -> None:
    """What it gives before a `kill -9` of the whole service is averaged after that; the client waits for the service,
    and the adapter has the bytes of a training that had the client's rows as a dataset, and was left alone."""
    rows = sums(9)
    files = [write_rows(tmp_path / f"part-{part}.jsonl", rows[part :: CLIENTS + 1]) for part in range(4)]
    own, *sets = (service.post("/datasets", files=[("file", (f.name, f.read_bytes()))])["id"] for f in files)
    model = service.post("/models", json={"path": str(tmp_path / "roots" / "tiny"), "name": "base"})["id"]
    body: dict[str, Any] = {
        "method": "ffa-lora",
        "base_model": model,
        "dataset": own,
        "training": {"learning_rate": 0.02, "batch_size": 8, "schedule": "constant"},
        "seed": 3,
    }
    shared = {"rank": 4, "rounds": 3, "local_steps": 8, "max_update_norm": 100.0}
    named = [{"dataset": identifier} for identifier in sets]
    whole = service.ended(service.post("/train", json=body | {"parameters": {**shared, "clients": named}})["id"])
    assert whole["state"] == "succeeded", whole["error"]

    remote = {"remote": {"name": "site", "key": service.key, "max_rows": 1000}}
    job = service.post("/train", json=body | {"parameters": {**shared, "clients": [*named[:2], remote]}})["id"]
    client = service.federate(job, files[3])

    def given() -> bool:
        rounds = service.http.get(f"/jobs/{job}/rounds").json()["items"]
        return bool(rounds) and rounds[0]["clients"][2]["state"] == "answered"

    service.until(given, "the remote client's first update")
    service.kill()
    service.start()
    assert given()
    found = service.ended(job)
    assert found["state"] == "succeeded", found["error"]
    out, _ = client.communicate(timeout=120)
    assert client.returncode == 0, service.log.read_text()[-4000:]
    told = json.loads(out)
    assert (told["training_state"], [item["round"] for item in told["given"]]) == ("succeeded", [1, 2, 3])
    assert service.digest(found) == service.digest(whole)
    assert found["result"]["report"]["evaluation"]["after"] == whole["result"]["report"]["evaluation"]["after"]
    assert service.secret not in service.log.read_text()
    data = tmp_path / "data"
    assert not any(service.secret.encode() in path.read_bytes() for path in data.rglob("*") if path.is_file())

    (tmp_path / "roots" / "tiny" / "tokenizer.json").write_text("{}")
    late = service.federate(job, files[3])  # the training has ended: nothing is asked of it any more
    assert json.loads(late.communicate(timeout=120)[0]) == {"training_state": "succeeded", "given": []}
    other = service.post("/train", json=body | {"parameters": {**shared, "clients": [*named[:2], remote]}})["id"]
    odd = service.federate(other, files[3])
    assert odd.communicate(timeout=120)[0].count(b"other tokenizer than the training's") == 1
    assert odd.returncode == 1
