"""The application factory: what importing it costs, and what starting it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.main import create_app, pool_settings, start, stop
from app.settings import Settings
from artifacts.errors import DatabaseUnavailable

HEAVY = ("torch", "transformers", "peft", "sklearn", "scipy", "numpy", "pandas", "accelerate", "pyarrow")
MODULES = 1_300
_PROGRAM = f"""
import sys
before = len(sys.modules)
import app.main
print(len(sys.modules) - before, *sorted(set({HEAVY!r}) & set(sys.modules)))
"""


def test_importing_the_application_loads_little_and_nothing_heavy() -> None:
    run = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    count, *loaded = run.stdout.split()
    assert loaded == []
    # Each costs about a millisecond at every start of a server, a worker and a command.
    assert int(count) < MODULES


def test_starting_brings_the_tables_up_and_stopping_is_clean(tmp_path: Path) -> None:
    services = create_app(Settings(data_dir=tmp_path / "new", pool="off", log_level="error")).state.services
    start(services)
    assert services.database.current_revision() == services.database.head_revision()
    assert services.supervisor is None
    stop(services)


def test_a_server_that_can_not_work_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    database = f"sqlite:///{tmp_path}/file/rankwise.db"
    settings = Settings(data_dir=tmp_path / "data", database_url=database, pool="off", log_level="error")
    with pytest.raises(DatabaseUnavailable):
        start(create_app(settings).state.services)


def test_the_pool_gets_the_settings(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, devices="cpu:3", lease_seconds=10, beat_seconds=2, model_roots=("/models",))
    pool = pool_settings(settings)
    assert (pool.devices, pool.lease_seconds, pool.beat_seconds) == ("cpu:3", 10, 2)
    assert pool.database_url == settings.database_url
    assert pool.server_id == pool_settings(settings).server_id
    assert list(map(str, pool.model_roots)) == ["/models"]


def test_a_path_without_parameters_is_nobodys_id(server: Any) -> None:
    for method in ("GET", "HEAD", "DELETE", "OPTIONS", "PUT"):
        answer = server.client.request(method, "/adapters/import")
        assert answer.status_code == 405, method
        assert answer.headers["Allow"] == "POST"
    assert server.client.request("OPTIONS", "/adapters/adp_1").headers["Allow"] == "DELETE, GET"
