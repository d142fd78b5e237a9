"""A real server with something in every table, and a stand-in for the pool that ends every job at once.

Also the fixtures of the pool, whose worker processes import `pool_kinds` by the path that is set here.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from app.main import create_app
from app.settings import Settings
from app.state import Services
from storage import claims, keys

sys.path.insert(0, str(Path(__file__).parent.parent / "workers"))

from pool_harness import (  # noqa: F401
    _exists,
    _has_ended,
    _wait_until,
    database,
    empty_database,
    pool,
    provider,
)
from ray_harness import (  # noqa: F401
    make_ray_cluster,
    make_ray_provider,
    ray_cluster,
    ray_provider,
    ray_work_dir,
)

RANK, SIDE = 2, 4


class JobEnder(threading.Thread):
    """Claims every queued job and lets it succeed or fail in turn, as a pool would."""

    def __init__(self, services: Services) -> None:
        super().__init__(daemon=True)
        self.database = services.database
        self.stopping = threading.Event()
        self.ended = 0

    def run(self) -> None:
        slots = [{"name": "cpu:0", "device": "cpu", "state": "idle", "pid": 1, "warm": []}]
        with self.database.write() as session:
            claims.register_server(session, "srv_contract", "boot_1", "here", slots)
        while not self.stopping.wait(0.05):
            while self._end_one():
                self.ended += 1

    def _end_one(self) -> bool:
        with self.database.write() as session:
            claim = claims.claim_next(
                session, server_id="srv_contract", boot_id="boot_1", slot="cpu:0", lease_seconds=600
            )
            if claim is None:
                return False
            if self.ended % 2:
                error = {"code": "merge_refused", "detail": "refused", "hint": None}
                claims.finish_failed(session, claim.job_id, claim.attempt, error, {"code": 0, "signal": None})
            else:
                result = {"adapters": [], "images": [], "report": {"seconds": 0.1}}
                claims.finish_succeeded(session, claim.job_id, claim.attempt, result)
        return True


def adapter_parts(seed: int) -> list[tuple[str, tuple[str, bytes]]]:
    """The files of a small PEFT LoRA."""
    header, data = {}, b""
    for name, shape in (("lora_A", [RANK, SIDE]), ("lora_B", [SIDE, RANK])):
        values = struct.pack(f"<{RANK * SIDE}f", *(seed + 0.5 * index for index in range(RANK * SIDE)))
        key = f"base_model.model.layers.0.q_proj.{name}.weight"
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj"]}
    return [
        ("file", ("adapter_model.safetensors", len(text).to_bytes(8, "little") + text + data)),
        ("file", ("adapter_config.json", json.dumps(config).encode())),
    ]


def seed(client: httpx.Client) -> None:
    """Something for every call to find."""
    ids = []
    for number in (1, 2):
        created = client.post("/adapters", files=adapter_parts(number), data={"name": f"adapter {number}"})
        assert created.status_code == 201, created.text
        ids.append(created.json()["id"])
    for text in ('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n', '{"prompt": "a", "completion": "b"}\n'):
        stored = client.post("/datasets", files={"file": ("data.jsonl", text.encode())})
        assert stored.status_code == 201, stored.text
    assert client.post("/models", json={"hub_id": "acme/tiny", "revision": "a" * 40}).status_code == 201
    hook = client.post("/webhooks", json={"url": "https://hooks.invalid/in"})
    assert hook.status_code == 201, hook.text
    assert client.post(f"{hook.headers['location']}/test").status_code == 202
    for _ in range(2):
        merged = client.post("/merge", json={"adapters": [{"id": key} for key in ids], "method": "cat"})
        assert merged.status_code == 202, merged.text
    job = {"kind": "merge", "params": {"adapters": [{"id": key} for key in ids], "method": "cat"}}
    for trigger in ({"cron": "0 3 * * *", "timezone": "Europe/Berlin"}, {"event": "base_model.deprecated"}):
        made = client.post("/schedules", json={"trigger": trigger, "job": job, "overlap": "queue"})
        assert made.status_code == 201, made.text


@pytest.fixture
def contract_server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, str | None]]:
    """(URL, API key or None) of a seeded server; with keys when the fixture's parameter is "keys"."""
    with_keys = getattr(request, "param", None) == "keys"
    app = create_app(Settings(data_dir=tmp_path / "data", pool="off", api_keys=with_keys, log_level="error"))
    services = app.state.services
    services.database.upgrade()
    secret = None
    if with_keys:
        with services.database.write() as session:
            _, secret = keys.create_key(session, "contract", ["admin"])
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    ender = JobEnder(services)
    ender.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    with httpx.Client(base_url=url, timeout=30, trust_env=False, headers=headers) as client:
        seed(client)
    yield url, secret
    ender.stopping.set()
    ender.join(timeout=20)
    server.should_exit = True
    thread.join(timeout=20)
    assert not thread.is_alive()
