"""Transfers on record: one for equal requests, one decision on what waits, which no sweep takes away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from artifacts.base_model import BaseModelRef
from artifacts.errors import NotFound, StateConflict
from artifacts.manifest import AdapterManifest, FileEntry
from storage import adapters, jobs, models, sealed_inputs, transfers
from storage.blobs import BlobStore
from storage.database import Database
from storage.tables import AdapterRow, HeldFileRow, JobRow
from storage.transfers import HeldAdapter, TransferFacts, TransferFilter

Make = Callable[..., AdapterManifest]


@pytest.fixture
def facts(database: Database, blobs: BlobStore, make_manifest: Make) -> TransferFacts:
    """Of a stored adapter between two registered bases."""
    entry = FileEntry("adapter_model.safetensors", blobs.put_bytes(b"source"), 6, "t")
    with database.write() as session:
        bases = [
            models.add_model(session, BaseModelRef(name, "path", f"/{name}", weights_digest=name[0] * 64))[0].id
            for name in ("source", "target")
        ]
        row, _ = adapters.add_adapter(session, make_manifest("source", files=(entry,)), name="orders")
        return TransferFacts("k" * 64, "r" * 64, row.id, row.name, *bases, "copy", "s" * 64)


def submit(session: Session, facts: TransferFacts, instead_of: Any = None) -> JobRow:
    job = jobs.create_job(session, "transfer", {"adapter": facts.adapter_id})
    transfers.add_transfer(session, job, facts, instead_of)
    sealed_inputs.seal(session, job.id, {"seeds": ["secret"]})
    return job


def held(manifest: AdapterManifest, facts: TransferFacts) -> HeldAdapter:
    parent = adapters.Parent(facts.adapter_id, {"method": "copy"})
    return HeldAdapter(manifest, "moved", "as is", ("new",), "target", facts.target_model, (parent,))


@pytest.fixture
def waiting(database: Database, blobs: BlobStore, make_manifest: Make, facts: TransferFacts) -> str:
    """The id of a transfer whose adapter waits for a decision."""
    entry = FileEntry("adapter_model.safetensors", blobs.put_bytes(b"moved"), 5, "t")
    with database.write() as session:
        job = submit(session, facts)
        document = held(make_manifest("moved", files=(entry,)), facts)
        transfers.record_end(session, job.id, "hold", degraded=True, held=document)
        return job.id


def test_equal_requests_are_one_transfer(database: Database, facts: TransferFacts) -> None:
    with database.write() as session:
        assert transfers.find_same(session, facts.request_key) is None
        first = submit(session, facts).id
    with pytest.raises(IntegrityError), database.write() as session:
        submit(session, facts)
    with database.write() as session:
        submit(session, replace(facts, request_key="q" * 64))
        found = transfers.find_same(session, facts.request_key)
        assert found is not None
        assert found[1].id == first
        assert not transfers.may_be_repeated(found[1])


def test_a_transfer_that_failed_makes_way_for_the_next(database: Database, facts: TransferFacts) -> None:
    with database.write() as session:
        first = submit(session, facts).id
        jobs.request_cancel(session, first)
        found = transfers.find_same(session, facts.request_key)
        assert found is not None
        assert transfers.may_be_repeated(found[1])
        second = submit(session, facts, found[0]).id
    with database.read() as session:
        assert transfers.get_transfer(session, first).superseded_by == second
        now = transfers.find_same(session, facts.request_key)
        assert now is not None
        assert now[1].id == second
    with pytest.raises(StateConflict, match=second), database.write() as session:
        jobs.retry_job(session, first)


def test_a_retry_is_that_transfer_with_its_seeds(database: Database, facts: TransferFacts) -> None:
    with database.write() as session:
        first = submit(session, facts).id
        jobs.request_cancel(session, first)
        again = jobs.retry_job(session, first).id
    with database.read() as session:
        row = transfers.get_transfer(session, again)
        assert (row.key, row.adapter_id, row.seeds_digest) == (facts.key, facts.adapter_id, facts.seeds_digest)
        assert transfers.get_transfer(session, first).superseded_by == again
        assert sealed_inputs.unseal(session, again) == {"seeds": ["secret"]}
        assert transfers.sealed_of(session, facts.adapter_id, "s" * 64) == {"seeds": ["secret"]}
        assert transfers.sealed_of(session, facts.adapter_id, "x" * 64) is None


def test_seeds_of_ended_transfers_go_with_the_adapter(database: Database, facts: TransferFacts) -> None:
    with database.write() as session:
        ended = submit(session, facts).id
        jobs.request_cancel(session, ended)
        waits = submit(session, replace(facts, request_key="q" * 64)).id
        adapters.delete_adapter(session, facts.adapter_id)
    with database.read() as session:
        assert sealed_inputs.unseal(session, waits) == {"seeds": ["secret"]}, "unfinished work needs it"
        with pytest.raises(NotFound):
            sealed_inputs.unseal(session, ended)


def test_what_waits_outlives_sweeps_and_its_source_and_is_published_once(
    database: Database, blobs: BlobStore, facts: TransferFacts, waiting: str, sweep: Callable[[], Any]
) -> None:
    with database.write() as session:
        jobs.request_cancel(session, waiting)  # no unfinished job names the adapter any more
        adapters.delete_adapter(session, facts.adapter_id)
    sweep()
    sweep()
    with database.write() as session:
        row = transfers.decide(session, waiting, "publish", by=None, reason="looked at")
        assert (row.decision, row.reason, row.held) == ("publish", "looked at", None)
        new, moment = row.new_adapter, row.decided_at
    assert new is not None
    with database.write() as session:
        row = transfers.decide(session, waiting, "publish", by=None, reason="again")
        assert (row.new_adapter, row.decided_at, row.reason) == (new, moment, "looked at")
        with pytest.raises(StateConflict, match="decided on before"):
            transfers.decide(session, waiting, "discard", by=None, reason=None)
    with database.read() as session:
        found = adapters.get_adapter(session, new)
        assert (found.name, found.tags, found.origin, found.job_id) == ("moved", ["new"], "transfer", waiting)
        assert found.model_id == facts.target_model
        [edge] = adapters.lineage(session, new).edges
        assert (edge.parent_id, edge.recipe) == (facts.adapter_id, {"method": "copy"})
        assert blobs.exists(adapters.manifest_of(found).files[0].sha256)
        assert session.scalars(select(HeldFileRow)).all() == []


def test_what_is_discarded_goes_with_the_next_sweep(
    database: Database, blobs: BlobStore, waiting: str, sweep: Callable[[], Any]
) -> None:
    with database.read() as session:
        [file] = transfers.get_transfer(session, waiting).files
    sweep()
    assert blobs.exists(file.sha256)
    with database.write() as session:
        row = transfers.decide(session, waiting, "discard", by=None, reason=None)
        assert row.new_adapter is None
    sweep()
    assert not blobs.exists(file.sha256)
    with database.read() as session:
        assert [row.name for row in session.scalars(select(AdapterRow))] == ["orders"]


def test_nothing_waits_where_the_gate_has_decided(database: Database, facts: TransferFacts) -> None:
    with database.write() as session:
        job = submit(session, facts)
        with pytest.raises(StateConflict, match="not judged yet"):
            transfers.decide(session, job.id, "publish", by=None, reason=None)
        transfers.record_end(session, job.id, "fail", degraded=False)
        with pytest.raises(StateConflict, match="the gate said fail"):
            transfers.decide(session, job.id, "publish", by=None, reason=None)
        with pytest.raises(NotFound):
            transfers.decide(session, "job_\x00", "publish", by=None, reason=None)


def test_lists_are_filtered_and_paged(database: Database, facts: TransferFacts, waiting: str) -> None:
    with database.write() as session:
        others = [submit(session, replace(facts, request_key=str(place) * 64)).id for place in range(3)]
        jobs.request_cancel(session, others[1])
    with database.read() as session:

        def ids(**filters: Any) -> list[str]:
            page = transfers.list_transfers(session, TransferFilter(**filters))
            return [row.job_id for row in page.items]

        assert ids() == [*reversed(others), waiting]
        assert ids(verdict="hold", adapter_id=facts.adapter_id) == [waiting]
        assert ids(state="cancelled") == [others[1]]
        assert ids(target_model=facts.source_model) == []
        assert ids(source_model=facts.source_model, state="queued") == [others[2], others[0], waiting]
        first = transfers.list_transfers(session, TransferFilter(), limit=3)
        rest = transfers.list_transfers(session, TransferFilter(), first.next, limit=3)
        assert [row.job_id for row in (*first.items, *rest.items)] == ids()
        assert rest.next is None
        assert set(transfers.jobs_of(session, first.items)) == set(others)
