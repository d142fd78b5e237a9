"""Base models go out of use: dates that come, what keeps a model from being removed, waivers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select

from artifacts.base_model import BaseModelRef
from artifacts.errors import NotFound, RequestInvalid, StateConflict
from artifacts.manifest import AdapterManifest
from storage import adapters, claims, jobs, models, retirement, schedules, transfers, waivers
from storage import database as clock
from storage.adapters import Parent
from storage.database import Database
from storage.dependents import LISTED, dependents_of
from storage.ids import new_id
from storage.retirement import Retirement
from storage.schedules import JobTemplate, Trigger
from storage.tables import AliasRow, DomainEventRow, ModelRow
from storage.transfers import TransferFacts

HOUR = timedelta(hours=1)
Make = Callable[..., AdapterManifest]


def register(database: Database, name: str = "acme/old", **fields: Any) -> str:
    with database.write() as session:
        return models.add_model(session, BaseModelRef(name, "hub", name, **fields))[0].id


def now(database: Database) -> datetime:
    with database.read() as session:
        return clock.now(session)


def deprecate(database: Database, model: str, **plan: Any) -> ModelRow:
    with database.write() as session:
        return retirement.deprecate(session, model, Retirement(**plan))


def advance(database: Database, moment: datetime | None = None) -> list[str]:
    with database.read() as session:
        due = retirement.is_due(session, moment)
    done = []
    for model in due:
        with database.write() as session:
            done += retirement.advance(session, model, moment=moment)
    return done


def remove(database: Database, model: str) -> None:
    with database.write() as session:
        retirement.remove_model(session, model)


def events(database: Database) -> list[tuple[str, str]]:
    with database.read() as session:
        rows = session.scalars(select(DomainEventRow).order_by(DomainEventRow.id)).all()
    return [(row.type.removeprefix("base_model."), row.subject) for row in rows if row.type != "base_model.registered"]


def upload(database: Database, make_manifest: Make, content: str, **options: Any) -> str:
    with database.write() as session:
        manifest = make_manifest(content, **options.pop("manifest", {}))
        return adapters.add_adapter(session, manifest, name=content, **options)[0].id


def move(database: Database, adapter: str, source: str, target: str, new: str | None) -> None:
    """A transfer that has ended: what it published, if anything."""
    with database.write() as session:
        job = jobs.create_job(session, "transfer", {})
        jobs.request_cancel(session, job.id)
        facts = TransferFacts(new_id("key"), new_id("key"), adapter, "a", source, target, "copy")
        transfers.add_transfer(session, job, facts)
        transfers.get_transfer(session, job.id).new_adapter = new


def counts(database: Database, model: str) -> dict[str, int]:
    with database.read() as session:
        return dependents_of(session, models.get_model(session, model)).counts


def test_the_event_is_published_when_its_date_has_come_and_once(database: Database) -> None:
    model = register(database)
    start = now(database)
    deprecate(database, model, deprecate_at=start + HOUR)
    assert advance(database, start) == []
    assert events(database) == []
    gate = threading.Barrier(3)
    done: list[str] = []

    def server() -> None:
        gate.wait(30)
        with database.write() as session:
            done.extend(retirement.advance(session, model, moment=start + HOUR))

    servers = [threading.Thread(target=server) for _ in range(3)]
    for thread in servers:
        thread.start()
    for thread in servers:
        thread.join(30)
    assert done == ["deprecated"]
    assert advance(database, start + 2 * HOUR) == []
    assert events(database) == [("deprecated", model)]


def test_a_deprecation_from_now_on_is_an_event_at_once_and_a_second_one_is_none(database: Database) -> None:
    model, other = register(database), register(database, "acme/new")
    first = deprecate(database, model)
    again = deprecate(database, model, successor="acme/new", reason="the new one is better")
    assert again.deprecated_at == first.deprecated_at, "it does not begin anew"
    assert (again.successor_id, again.deprecation_reason) == (other, "the new one is better")
    assert events(database) == [("deprecated", model)]
    with database.read() as session:
        (told,) = retirement.warnings_of(session, [model, other])
    assert told.startswith("The base model 'acme/old' is deprecated since ")
    assert told.endswith(": the new one is better. Use 'acme/new' instead.")


def test_an_event_that_was_taken_back_happens_again(database: Database) -> None:
    model = register(database)
    deprecate(database, model)
    with database.write() as session:
        row = retirement.update_model(session, model, deprecated_at=None)
        assert (row.deprecation_told_at, row.successor_id) == (None, None)
        assert retirement.warnings_of(session, [model]) == []
    deprecate(database, model)
    assert events(database) == [("deprecated", model)] * 2


def test_plans_that_can_not_be(database: Database) -> None:
    model = register(database)
    start = now(database)
    for plan, pointer in (
        ({"deprecate_at": start + HOUR, "remove_at": start}, "/remove_at"),
        ({"successor": "acme/none"}, "/successor"),
        ({"successor": model}, "/successor"),
        ({"reason": "\x00"}, "/reason"),
    ):
        with pytest.raises(RequestInvalid) as refused:
            deprecate(database, model, **plan)
        assert [item.pointer for item in refused.value.errors] == [pointer]
    with pytest.raises(NotFound):
        deprecate(database, "mdl_none")
    assert events(database) == []
    remove(database, model)
    with pytest.raises(StateConflict):
        deprecate(database, model)


def test_a_model_that_nothing_depends_on_goes_by_itself(database: Database) -> None:
    model = register(database)
    start = now(database)
    deprecate(database, model, deprecate_at=start + HOUR, remove_at=start + 2 * HOUR)
    assert advance(database, start + 2 * HOUR) == ["deprecated", "removed"]
    assert events(database) == [("deprecated", model), ("removed", model)]
    with database.read() as session:
        assert models.get_model(session, model).removed_at == start + 2 * HOUR


def test_an_adapter_keeps_its_base_until_it_is_moved(database: Database, make_manifest: Make) -> None:
    model, target = register(database), register(database, "acme/new")
    adapter = upload(database, make_manifest, "a", model_id=model)
    start = now(database)
    deprecate(database, model, remove_at=start + HOUR)
    assert advance(database, start + HOUR) == []
    with pytest.raises(StateConflict) as refused:
        remove(database, model)
    assert "1 adapter depend" in refused.value.detail
    assert [item.pointer for item in refused.value.errors] == [f"/adapters/{adapter}"]
    upload(database, make_manifest, "merged", parents=[Parent(adapter)], origin="merge", model_id=target)
    assert counts(database, model) == {"adapters": 1}, "a merge is no transfer"
    move(database, adapter, model, target, None)
    assert counts(database, model) == {"adapters": 1}, "the gate let nothing pass"
    same = upload(database, make_manifest, "same base", model_id=model)
    move(database, adapter, model, model, same)
    assert counts(database, model) == {"adapters": 2}, "it has not left, nor has what was made of it"
    with database.write() as session:
        adapters.delete_adapter(session, same)
    moved = upload(database, make_manifest, "moved", model_id=target)
    move(database, adapter, model, target, moved)
    assert counts(database, model) == {}
    with database.write() as session:
        adapters.delete_adapter(session, moved)
    assert counts(database, model) == {"adapters": 1}, "what was made of it is gone"
    with database.write() as session:
        adapters.delete_adapter(session, adapter)
    assert advance(database, start + HOUR) == ["removed"]


def test_an_adapter_that_only_names_the_base_depends_on_it(database: Database, make_manifest: Make) -> None:
    model = register(database, revision="1")
    for content, base, revision in (("a", "acme/old", None), ("b", "acme/old", "1"), ("c", "acme/old", "2")):
        named = {"base_model": base, "base_model_revision": revision}
        upload(database, make_manifest, content, manifest=named)
    upload(database, make_manifest, "d", manifest={"base_model": "acme/other"})
    assert counts(database, model) == {"adapters": 2}


def test_a_waiver_lets_an_adapter_go_with_its_base(database: Database, make_manifest: Make) -> None:
    model = register(database)
    adapter = upload(database, make_manifest, "a", model_id=model)
    with database.write() as session:
        waivers.put_waiver(session, adapter, "nobody calls it")
        row = waivers.put_waiver(session, adapter, "nobody calls it any more")
        assert row.reason == "nobody calls it any more"
    assert counts(database, model) == {}
    with database.write() as session:
        waivers.drop_waiver(session, adapter)
        with pytest.raises(NotFound):
            waivers.drop_waiver(session, adapter)
    assert counts(database, model) == {"adapters": 1}
    with database.write() as session:
        waivers.put_waiver(session, adapter, "again")
        adapters.delete_adapter(session, adapter)
        assert waivers.get_waiver(session, adapter) is None
        with pytest.raises(NotFound):
            waivers.put_waiver(session, adapter, "gone")


def test_an_alias_keeps_the_base_that_it_is_served_on(database: Database, make_manifest: Make) -> None:
    model, target = register(database), register(database, "acme/new")
    adapter = upload(database, make_manifest, "a", model_id=model)
    moved = upload(database, make_manifest, "b", model_id=target)
    moment = now(database)
    with database.write() as session:
        waivers.put_waiver(session, adapter, "only its alias matters here")
        given = {"version": 1, "created_at": moment, "updated_at": moment}
        session.add(AliasRow(name="orders", adapter_id=adapter, **given))
    assert counts(database, model) == {"aliases": 1}
    with pytest.raises(StateConflict, match="1 alias depend"):
        remove(database, model)
    with database.write() as session:
        session.get_one(AliasRow, "orders").adapter_id = moved
    remove(database, model)


def test_jobs_and_schedules_that_need_the_base(database: Database, make_manifest: Make) -> None:
    model = register(database)
    adapter = upload(database, make_manifest, "a", model_id=model)
    template = JobTemplate("train", {"base_model": "acme/old"}, {})
    with database.write() as session:
        waivers.put_waiver(session, adapter, "only its jobs matter here")
        loads = jobs.create_job(session, "train", {}, affinity=model)
        names = jobs.create_job(session, "compose", {"scenes": [{"base_model": "acme/old"}]})
        moves = jobs.create_job(session, "transfer", {"adapter": adapter, "target_model": "acme/new"})
        jobs.create_job(session, "merge", {"adapters": [{"id": adapter}]})  # works on factors alone
        jobs.create_job(session, "train", {"base_model": "acme/other"})
        schedule = schedules.create_schedule(session, Trigger(cron="0 3 * * *"), template)
        schedules.create_schedule(session, Trigger(cron="0 3 * * *"), template, enabled=False)
        gone = schedules.create_schedule(session, Trigger(cron="0 3 * * *"), template)
        schedules.delete_schedule(session, gone.id)
        waiting = Trigger(event="base_model.removed", subject=model)
        schedules.create_schedule(session, waiting, JobTemplate("merge", {}, {}))
    assert counts(database, model) == {"schedules": 1, "jobs": 3}
    with database.write() as session:
        found = dependents_of(session, models.get_model(session, model))
        assert [item.id for item in found.first] == [schedule.id, loads.id, names.id, moves.id]
        claims.register_server(session, "srv_1", "boot", "here", [])
        for job in (loads, names, moves):
            jobs.request_cancel(session, job.id)
        schedules.update_schedule(session, schedule.id, enabled=False)
    assert counts(database, model) == {}
    remove(database, model)


def test_at_most_twenty_are_listed_and_all_are_counted(database: Database, make_manifest: Make) -> None:
    model = register(database)
    for number in range(LISTED + 3):
        upload(database, make_manifest, f"a{number}", model_id=model)
    with database.read() as session:
        found = dependents_of(session, models.get_model(session, model))
    assert (found.counts, len(found.first)) == ({"adapters": LISTED + 3}, LISTED)
    assert found.words() == f"{LISTED + 3} adapters"


def test_a_removal_that_is_taken_back(database: Database) -> None:
    model = register(database)
    remove(database, model)
    remove(database, model)
    assert events(database) == [("removed", model)]
    with database.write() as session:
        retirement.update_model(session, model, removed_at=None)
        assert models.get_model(session, model).removed_at is None
        row = retirement.update_model(session, model, removed_at=datetime(2020, 1, 1, tzinfo=UTC))
        assert row.removed_at == datetime(2020, 1, 1, tzinfo=UTC)
        ahead = clock.now(session) + HOUR
        row = retirement.update_model(session, model, removed_at=ahead)
        assert (row.removed_at, row.remove_at) == (None, ahead)
        row = retirement.update_model(session, model, remove_at=None)
        assert row.remove_at is None
