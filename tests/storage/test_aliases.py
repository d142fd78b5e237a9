"""Aliases in the database: one row whatever comes at once; a transfer moves only its own source's."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from artifacts.errors import PreconditionFailed, StateConflict
from artifacts.manifest import AdapterManifest
from storage import adapters, aliases, jobs
from storage.database import Database

Make = Callable[..., AdapterManifest]


@pytest.fixture
def ids(database: Database, make_manifest: Make) -> list[str]:
    with database.write() as session:
        return [adapters.add_adapter(session, make_manifest(name), name=name)[0].id for name in ("one", "two", "three")]


def test_many_switches_at_once_are_one_after_another(database: Database, ids: list[str]) -> None:
    outcomes: list[str] = []

    def switch(adapter_id: str) -> None:
        try:
            with database.write() as session:
                row, made = aliases.put_alias(session, "orders", adapter_id, if_version=None)
                outcomes.append("made" if made else f"version {row.version}")
        except PreconditionFailed:
            outcomes.append("refused")

    threads = [threading.Thread(target=switch, args=(ids[number % 3],)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("made") == 1
    with database.read() as session:
        row = aliases.get_alias(session, "orders")
        switches = aliases.switches_of(session, "orders")
    assert [item.version for item in switches] == list(range(row.version, 0, -1))
    assert switches[0].adapter_id == row.adapter_id


def test_a_transfer_moves_only_the_alias_of_its_own_source(database: Database, ids: list[str]) -> None:
    with database.write() as session:
        job_id = jobs.create_job(session, "transfer", {}).id
        aliases.put_alias(session, "orders", ids[0])
        assert not aliases.move_with(session, "orders", ids[1], ids[2], job_id)
        assert not aliases.move_with(session, "nobody", ids[0], ids[2], job_id)
        assert aliases.get_alias(session, "orders").adapter_id == ids[0]
        assert aliases.move_with(session, "orders", ids[0], ids[2], job_id)
        assert aliases.switches_of(session, "orders")[0].job_id == job_id
    with pytest.raises(StateConflict, match="orders"), database.write() as session:
        adapters.delete_adapter(session, ids[2])
    with database.write() as session:
        adapters.delete_adapter(session, ids[0])
        aliases.delete_alias(session, "orders")
        adapters.delete_adapter(session, ids[2])
