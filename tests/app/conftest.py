"""A real server on loopback for each test, adapters made byte by byte, and a stand-in for the pool."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from sqlalchemy import func, select

from app.main import create_app
from app.settings import Settings
from app.state import Services
from storage import claims
from storage.database import Database
from storage.tables import AdapterRow, IdempotencyRow, JobEventRow, JobRow, ModelRow

sys.path.insert(0, str(Path(__file__).parent))

from schedule_calls import schedule  # noqa: F401
from training_server import training  # noqa: F401
from upload_pieces import small_segments  # noqa: F401

Files = list[tuple[str, tuple[str, bytes]]]


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    port: int
    services: Services
    client: httpx.Client

    def staged(self) -> list[str]:
        """Everything that lies in the staging folder."""
        return [str(path) for path in self.services.staging.rglob("*")]

    def blob_count(self) -> int:
        return len(list(self.services.blobs.iter_digests()))

    def rows(self) -> dict[str, int]:
        """How many rows the tables have that a request could leave behind."""
        tables = (AdapterRow, JobRow, JobEventRow, ModelRow, IdempotencyRow)
        with self.services.database.read() as session:
            return {
                table.__tablename__: session.scalar(select(func.count()).select_from(table)) or 0 for table in tables
            }

    def assert_nothing_left(self) -> None:
        assert self.staged() == []
        assert self.blob_count() == 0
        assert not any(self.rows().values()), self.rows()

    def upload(self, files: Files, fields: Mapping[str, Any] | None = None, **options: Any) -> httpx.Response:
        return self.client.post("/adapters", files=files, data=dict(fields or {}), **options)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with all tables: copying it is quicker than migrating again for every test."""
    path = tmp_path_factory.mktemp("template") / "rankwise.db"
    database = Database(f"sqlite:///{path}")
    database.upgrade()
    database.dispose()
    return path


class Servers:
    """Starts servers in threads of this process, on free ports, and stops them all."""

    def __init__(self, folder: Path, template: Path) -> None:
        self.folder = folder
        self.template = template
        self.running: list[tuple[uvicorn.Server, threading.Thread, httpx.Client]] = []

    def __call__(self, **settings: Any) -> Running:
        """Start one with these settings; without a pool unless they say so."""
        data_dir = self.folder / f"data-{len(self.running)}"
        data_dir.mkdir()
        shutil.copy(self.template, data_dir / "rankwise.db")
        app = create_app(Settings(data_dir=data_dir, **{"pool": "off", "log_level": "error", **settings}))
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)  # connections wait here until the server accepts
        port = listener.getsockname()[1]
        config = uvicorn.Config(
            app, log_config=None, access_log=False, http="httptools", loop="uvloop", timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{port}"
        client = httpx.Client(base_url=url, timeout=30.0, trust_env=False)
        self.running.append((server, thread, client))
        client.get("/healthz").raise_for_status()
        return Running(url, port, app.state.services, client)

    def stop(self) -> None:
        for server, _, client in self.running:
            client.close()
            server.should_exit = True
        for _, thread, _ in self.running:
            thread.join(timeout=20)
            assert not thread.is_alive()


@pytest.fixture
def serve(tmp_path: Path, empty_database: Path) -> Iterator[Servers]:
    """Start servers with settings of the test's own; they end with the test."""
    servers = Servers(tmp_path, empty_database)
    yield servers
    servers.stop()


@pytest.fixture(scope="module")
def module_servers(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Servers]:
    """Starts servers that stay for all tests of a module: for those that are slow to fill."""
    servers = Servers(tmp_path_factory.mktemp("module"), empty_database)
    yield servers
    servers.stop()


@pytest.fixture
def server(serve: Servers) -> Running:
    """A server with the defaults and no pool."""
    return serve()


@pytest.fixture(scope="module")
def untouched_server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Running]:
    """One server for all tests of a module whose requests must leave nothing behind."""
    servers = Servers(tmp_path_factory.mktemp("untouched"), empty_database)
    yield servers()
    servers.stop()


def safetensors(
    tensors: Mapping[str, tuple[str, list[int], bytes]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """A safetensors file of (dtype, shape, bytes) by name."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())


@dataclass
class AdapterFiles:
    """The two files of a small PEFT LoRA, and ways to send them."""

    rank: int = 4
    alpha: float = 8.0
    d_in: int = 8
    d_out: int = 6
    modules: tuple[str, ...] = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
    seed: int = 0
    base_model: str = "acme/tiny-llm"
    config: dict[str, Any] = field(default_factory=dict)
    value: float | None = None

    def numbers(self, count: int, salt: int) -> bytes:
        if self.value is not None:
            return struct.pack(f"<{count}f", *([self.value] * count))
        # A fixed, quickly varying sequence: the content only has to differ between seeds.
        return struct.pack(
            f"<{count}f",
            *(((index * 7919 + salt * 104729 + self.seed * 15485863) % 2003) / 1000 - 1 for index in range(count)),
        )

    def tensors(self) -> dict[str, tuple[str, list[int], bytes]]:
        found = {}
        for position, path in enumerate(self.modules):
            prefix = f"base_model.model.{path}"
            a, b = self.rank * self.d_in, self.d_out * self.rank
            found[f"{prefix}.lora_A.weight"] = ("F32", [self.rank, self.d_in], self.numbers(a, 2 * position))
            found[f"{prefix}.lora_B.weight"] = ("F32", [self.d_out, self.rank], self.numbers(b, 2 * position + 1))
        return found

    def config_json(self) -> bytes:
        document = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": sorted({path.rpartition(".")[2] for path in self.modules}),
            "base_model_name_or_path": self.base_model,
            **self.config,
        }
        return json.dumps(document).encode()

    def weights(self, metadata: Mapping[str, str] | None = None) -> bytes:
        return safetensors(self.tensors(), metadata)

    def parts(self) -> Files:
        return [
            ("file", ("adapter_model.safetensors", self.weights())),
            ("file", ("adapter_config.json", self.config_json())),
        ]


@pytest.fixture(scope="session")
def adapter_files() -> type[AdapterFiles]:
    return AdapterFiles


@pytest.fixture(scope="session")
def make_safetensors() -> Callable[..., bytes]:
    return safetensors


class FakePool:
    """Does what a supervisor does to the rows of jobs, one call at a time."""

    def __init__(self, services: Services) -> None:
        self.database = services.database
        with self.database.write() as session:
            claims.register_server(
                session, "srv_fake", "boot_1", "here", [{"name": "cpu:0", "device": "cpu", "state": "idle", "warm": []}]
            )

    def claim(self) -> tuple[str, int]:
        """Take the next job; fails when there is none."""
        with self.database.write() as session:
            claim = claims.claim_next(session, server_id="srv_fake", boot_id="boot_1", slot="cpu:0", lease_seconds=60)
        assert claim is not None
        return claim.job_id, claim.attempt

    def progress(self, job: tuple[str, int], fraction: float, message: str) -> None:
        with self.database.write() as session:
            claims.record_progress(session, *job, fraction=fraction, message=message)

    def succeed(self, job: tuple[str, int], result: dict[str, Any] | None = None) -> None:
        with self.database.write() as session:
            claims.finish_succeeded(session, *job, result or {"adapters": [], "images": [], "report": {}})

    def fail(self, job: tuple[str, int]) -> None:
        with self.database.write() as session:
            claims.finish_failed(
                session, *job, {"code": "file_broken", "detail": "it broke", "hint": None}, {"code": 1, "signal": None}
            )


@pytest.fixture
def fake_pool() -> Callable[[Running], FakePool]:
    return lambda running: FakePool(running.services)


@pytest.fixture
def two_adapters(server: Running) -> list[str]:
    """Ids of two adapters that can be merged."""
    ids = []
    for seed in (1, 2):
        response = server.upload(AdapterFiles(seed=seed).parts(), {"name": f"adapter {seed}"})
        assert response.status_code == 201, response.text
        ids.append(response.json()["id"])
    return ids
