"""Rule 9: blobs first, then one fenced transaction; what a dead attempt has stored is swept."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from artifacts.base_model import BaseModelRef
from storage import adapters, claims
from storage.blobs import BlobStore
from storage.sweep import sweep_blobs
from storage.tables import AdapterRow, BlobRow
from workers import publishing
from workers.attempt import AttemptSpec
from workers.context import Interruption, JobContext, JobOutcome, NewAdapter, NewModel
from workers.publishing import publish


@pytest.fixture
def context(pool: Any) -> JobContext:
    """A job of this pool in its first attempt, run by this process."""
    job_id = pool.submit("succeed")
    with pool.database.write() as session:
        assert claims.claim_next(session, server_id="s", boot_id="b", slot="cpu:0", lease_seconds=600) is not None
    settings = pool.settings()
    spec = AttemptSpec(
        job_id=job_id,
        attempt=1,
        kind="succeed",
        params={},
        slot="cpu:0",
        device="cpu",
        database_url=settings.database_url,
        blob_url=settings.blob_url,
        scratch=str(pool.folder / "scratch"),
        cache=str(pool.folder / "cache"),
        model_roots=(),
        function="",
    )
    (pool.folder / "scratch").mkdir()
    return JobContext(spec, pool.database, BlobStore(settings.blob_url), Interruption())


def test_every_blob_is_there_before_the_transaction_begins(
    pool: Any, context: JobContext, write_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = NewAdapter(write_adapter(context.scratch / "out", 5), "made")
    real, seen = claims.fence, []

    def fence(session: Any, job_id: str, attempt: int) -> Any:
        reserved = session.scalars(select(BlobRow.sha256)).all()
        seen.append((len(reserved), all(context.blobs.exists(sha256) for sha256 in reserved)))
        return real(session, job_id, attempt)

    monkeypatch.setattr(publishing.claims, "fence", fence)
    publish(context, JobOutcome((new,), {}))
    assert seen == [(2, True)]  # the weights and the configuration


def test_nothing_is_visible_before_all_of_it_is(
    pool: Any, context: JobContext, write_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [NewAdapter(write_adapter(context.scratch / name, seed), name) for seed, name in enumerate("ab")]
    real = adapters.add_adapter

    def add_adapter(*args: Any, **options: Any) -> Any:
        added = real(*args, **options)
        with pool.database.read() as other:
            assert other.scalars(select(AdapterRow.id)).all() == []
        assert pool.job(context.spec.job_id).state == "running"
        return added

    monkeypatch.setattr(publishing.adapters, "add_adapter", add_adapter)
    result = publish(context, JobOutcome(tuple(made), {}))
    with pool.database.read() as session:
        assert sorted(session.scalars(select(AdapterRow.id))) == sorted(result["adapters"])


def test_the_same_factors_for_two_new_models_are_two_adapters(
    pool: Any, context: JobContext, write_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing.claims, "finish_succeeded", lambda *_: None)
    new = NewAdapter(write_adapter(context.scratch / "out", 5), "made", on_new_model=True)

    def published(digest: str) -> tuple[str, str]:
        ref = BaseModelRef(f"model {digest}", "files", digest * 64, weights_digest=digest * 64)
        monkeypatch.setattr(publishing, "described", lambda *_: (ref, []))
        model = NewModel(context.scratch, ref.name)
        result = publish(context, JobOutcome((new,), {}, models=(model,)))
        return result["adapters"][0], result["models"][0]

    first, second = published("a"), published("b")
    assert published("a") == first
    assert {first[0], first[1]}.isdisjoint(second)
    with pool.database.read() as session:
        assert [adapters.get_adapter(session, id_).model_id for id_, _ in (first, second)] == [first[1], second[1]]


def test_the_blobs_of_an_attempt_that_died_are_swept(
    pool: Any, torch_provider: Any, add_adapter: Any, wait_until: Any
) -> None:
    """Killed between its blobs and its transaction, then cancelled: nothing of it stays."""
    pool.provider = torch_provider
    sources = [{"id": add_adapter(name, seed)} for seed, name in enumerate("ab")]
    blobs = BlobStore(pool.settings().blob_url)
    uploaded = set(blobs.iter_digests())
    job_id = pool.submit("mortal_merge", dies="before the transaction", adapters=sources, method="cat")
    pool.start(retry_seconds=3600.0)  # the second attempt waits, so that it can be cancelled before it runs
    wait_until(lambda: pool.job(job_id).failures == 1, "the first attempt is dead and the job waits again")
    pool.cancel(job_id)
    assert pool.ended(job_id).state == "cancelled"
    for supervisor in pool.supervisors:
        supervisor.stop()
    torch_provider.logs.flush(10)
    orphans = set(blobs.iter_digests()) - uploaded
    assert orphans
    sweep_blobs(pool.database, blobs, older_than=timedelta(0))
    left = set(blobs.iter_digests())
    assert uploaded <= left
    logs = {attempt.log_sha256 for attempt in pool.attempts(job_id)}
    assert left - uploaded <= logs
