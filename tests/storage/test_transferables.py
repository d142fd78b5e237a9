"""What an adapter keeps for transfers: there once, safe from the sweep, and gone with the adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select

from artifacts.errors import NotFound, RequestInvalid, StateConflict
from artifacts.manifest import AdapterManifest, FileEntry
from storage import adapters, claims, jobs, sealed_inputs, transferables
from storage.blobs import BlobStore
from storage.database import Database
from storage.tables import AdapterRow, TransferableFileRow, TransferableRow
from storage.transferables import Transferable

Make = Callable[..., AdapterManifest]


def transferable(blobs: BlobStore, content: str = "discriminator", seeds: tuple[str, ...] = ("a", "b", "c")) -> Any:
    digest = blobs.put_bytes(content.encode())
    return Transferable(
        seeds=seeds,
        task="orders",
        prompt_format={"template": "{x}", "chat": False, "system": None},
        size=96,
        recipe={"task": "orders", "chat": False},
        files=(FileEntry("adapter_model.safetensors", digest, len(content), "application/octet-stream"),),
        discriminator_digest="d" * 64,
        discriminator_base={"model_id": "mdl_1", "weights_digest": "w" * 64, "tokenizer_digest": "t" * 64},
        auc=0.9,
        settings={"held_out": 19},
    )


@pytest.fixture
def adapter_id(database: Database, blobs: BlobStore, make_manifest: Make) -> str:
    digest = blobs.put_bytes(b"adapter")
    manifest = make_manifest("adapter", files=(FileEntry("adapter_model.safetensors", digest, 7, "t"),))
    with database.write() as session:
        return adapters.add_adapter(session, manifest, name="adapter")[0].id


def test_it_is_kept_once_and_its_files_are_safe_from_the_sweep(
    database: Database, blobs: BlobStore, adapter_id: str, sweep: Callable[[], Any]
) -> None:
    kept = transferable(blobs)
    with database.write() as session:
        assert transferables.add(session, adapter_id, kept)
    with database.write() as session:
        assert not transferables.add(session, adapter_id, transferable(blobs, "another", ("x", "y", "z")))
    sweep()
    with database.read() as session:
        row = transferables.get(session, adapter_id)
        assert row is not None
        assert (row.seeds, row.task, row.size, row.auc) == (["a", "b", "c"], "orders", 96, 0.9)
        assert transferables.files_of(row) == kept.files
        assert transferables.get(session, "adp_\x00") is None
    assert blobs.exists(kept.files[0].sha256)


def test_it_goes_with_its_adapter_and_its_blobs_with_the_sweep(
    database: Database, blobs: BlobStore, adapter_id: str, sweep: Callable[[], Any]
) -> None:
    kept = transferable(blobs)
    with database.write() as session:
        transferables.add(session, adapter_id, kept)
    with database.write() as session:
        adapters.delete_adapter(session, adapter_id)
    with database.read() as session:
        assert transferables.get(session, adapter_id) is None
        assert session.scalars(select(TransferableFileRow)).all() == []
    sweep()
    assert not blobs.exists(kept.files[0].sha256)
    with database.read() as session:
        assert session.get(AdapterRow, adapter_id) is None


def test_a_job_that_needs_it_keeps_it_after_the_delete(
    database: Database, blobs: BlobStore, adapter_id: str, sweep: Callable[[], Any]
) -> None:
    kept = transferable(blobs)
    with database.write() as session:
        transferables.add(session, adapter_id, kept)
        job_id = jobs.create_job(session, "transfer", {"adapter": adapter_id}).id
    with database.write() as session:
        adapters.delete_adapter(session, adapter_id)
    sweep()
    with database.read() as session:
        assert transferables.get(session, adapter_id) is not None
    assert blobs.exists(kept.files[0].sha256)
    with database.write() as session:
        jobs.request_cancel(session, job_id)
    sweep()
    with database.read() as session:
        assert session.scalars(select(TransferableRow)).all() == []
    sweep()
    assert not blobs.exists(kept.files[0].sha256)


def test_a_text_that_can_not_be_stored_is_refused_where_it_stands(
    database: Database, blobs: BlobStore, adapter_id: str
) -> None:
    with pytest.raises(RequestInvalid) as raised, database.write() as session:
        transferables.add(session, adapter_id, transferable(blobs, seeds=("a", "secret\x00", "c")))
    assert raised.value.errors[0].pointer == "/seeds/1"
    assert "secret" not in str(raised.value)


def test_sealed_inputs_are_there_for_the_job_and_its_retry_until_a_day_after_its_end(
    database: Database, sweep: Callable[[], Any]
) -> None:
    with database.write() as session:
        job_id = jobs.create_job(session, "train", {"seeds": 1}).id
        sealed_inputs.seal(session, job_id, {"seeds": ["secret"]})
        bare = jobs.create_job(session, "train", {}).id
        jobs.request_cancel(session, job_id)
        jobs.request_cancel(session, bare)
    with database.write() as session:
        again = jobs.retry_job(session, job_id).id
        without = jobs.retry_job(session, bare).id
        assert sealed_inputs.unseal(session, again) == {"seeds": ["secret"]}
        with pytest.raises(NotFound):
            sealed_inputs.unseal(session, without)
    sweep()
    with database.read() as session:
        assert sealed_inputs.unseal(session, again) == {"seeds": ["secret"]}, "it has not ended"
        with pytest.raises(NotFound):
            sealed_inputs.unseal(session, job_id)
    with pytest.raises(StateConflict, match="removed"), database.write() as session:
        jobs.retry_job(session, job_id)
    with database.write() as session:
        sealed_inputs.drop(session, again)
    with pytest.raises(NotFound), database.read() as session:
        sealed_inputs.unseal(session, again)


def test_the_inputs_of_a_running_job_are_not_swept(database: Database, sweep: Callable[[], Any]) -> None:
    with database.write() as session:
        job_id = jobs.create_job(session, "train", {}).id
        sealed_inputs.seal(session, job_id, {"seeds": ["secret"]})
        claims.register_server(session, "srv_1", "boot_1", "here", [])
        claims.claim_next(session, server_id="srv_1", boot_id="boot_1", slot="cpu:0", lease_seconds=60)
    sweep()
    with database.read() as session:
        assert sealed_inputs.unseal(session, job_id) == {"seeds": ["secret"]}
