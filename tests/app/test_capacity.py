from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, update

from app import capacity
from app.settings import Settings
from artifacts.errors import RequestInvalid
from storage import servers
from storage.database import Database, now
from storage.tables import ServerRow


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> Iterator[Database]:
    shutil.copyfile(empty_database, tmp_path / "rankwise.db")
    database = Database(f"sqlite:///{tmp_path / 'rankwise.db'}")
    yield database
    database.dispose()


@pytest.fixture
def config(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, pool="off")


def slots(*hosts: str) -> list[dict[str, Any]]:
    return [{"name": f"cpu:{number}", "device": "cpu", "host": host} for number, host in enumerate(hosts)]


def register(database: Database, server_id: str, host: str, offered: list[dict[str, Any]]) -> None:
    with database.write() as session:
        servers.register_server(session, server_id, "run_1", host, offered)


def check(database: Database, config: Settings, kind: str, **resources: Any) -> None:
    with database.read() as session:
        capacity.check_devices(session, config, kind, resources)


def refusal(database: Database, config: Settings, kind: str, **resources: Any) -> str:
    with pytest.raises(RequestInvalid) as raised:
        check(database, config, kind, **resources)
    assert raised.value.errors[0].pointer == "/resources/devices"
    return raised.value.detail


def test_one_device_is_always_accepted(database: Database, config: Settings) -> None:
    check(database, config, "merge")
    check(database, config, "merge", devices=1)
    check(database, config, "evaluate", timeout_seconds=5)


def test_a_kind_uses_no_more_than_it_can(database: Database, config: Settings) -> None:
    register(database, "srv_1", "a", slots("a", "a", "a"))
    assert "merge can use 1" in refusal(database, config, "merge", devices=2)
    check(database, config, "evaluate", devices=3)


def test_the_devices_of_one_host_count(database: Database, config: Settings) -> None:
    register(database, "srv_1", "head", slots("n1", "n1", "n2", "n2", "n2"))
    register(database, "srv_2", "b", [{"name": "cuda:0", "device": "cuda:0"}, {"name": "cuda:1", "device": "cuda:1"}])
    check(database, config, "evaluate", devices=3)
    detail = refusal(database, config, "evaluate", devices=4)
    for text in ("n1 has 2", "n2 has 3", "b has 2"):
        assert text in detail


def test_the_slots_of_two_servers_of_one_host_do_not_add_up(database: Database, config: Settings) -> None:
    register(database, "srv_1", "a", slots("a", "a"))
    register(database, "srv_2", "a", slots("a", "a"))
    check(database, config, "evaluate", devices=2)
    assert "a has 2" in refusal(database, config, "evaluate", devices=3)


def test_a_server_that_is_silent_has_nothing(database: Database, config: Settings) -> None:
    register(database, "srv_1", "a", slots("a", "a"))
    check(database, config, "evaluate", devices=2)
    with database.write() as session:
        session.execute(update(ServerRow).values(seen_at=now(session) - timedelta(seconds=config.lease_seconds + 5)))
    assert "no server of the pool is alive" in refusal(database, config, "evaluate", devices=2)
    check(database, config, "evaluate", devices=1)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pool=st.lists(st.lists(st.sampled_from(["a", "b", "c"]), max_size=6), max_size=4), devices=st.integers(1, 7))
def test_accepted_exactly_when_some_server_has_them_on_one_host(
    database: Database, config: Settings, pool: list[list[str]], devices: int
) -> None:
    with database.write() as session:
        session.execute(delete(ServerRow))
    for number, hosts in enumerate(pool):
        register(database, f"srv_{number}", "own", slots(*hosts))
    largest = max((hosts.count(host) for hosts in pool for host in hosts), default=0)
    if devices == 1 or devices <= largest:
        check(database, config, "evaluate", devices=devices)
    else:
        refusal(database, config, "evaluate", devices=devices)
