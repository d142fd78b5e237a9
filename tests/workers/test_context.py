"""One attempt inside its process: progress, inputs, and publishing that is fenced and all or nothing."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from artifacts.errors import (
    AttemptCancelled,
    AttemptStale,
    BlobMissing,
    DatabaseUnavailable,
    NotFound,
    QuotaExceeded,
    RequestInvalid,
)
from storage import adapters, claims, keys
from storage.adapters import Parent
from storage.blobs import BlobStore
from storage.tables import AdapterRow, ApiKeyRow, JobRow
from train.catalog import parse_parameters
from workers import context as module
from workers import failures, runtime
from workers.attempt import AttemptSpec
from workers.context import Interruption, JobContext, JobOutcome, NewAdapter
from workers.publishing import publish
from workers.runtime import run_attempt


@pytest.fixture
def spec(pool: Any, monkeypatch: pytest.MonkeyPatch) -> AttemptSpec:
    """A claimed attempt that this process plays, on the connections of the test."""
    monkeypatch.setattr(runtime, "_stores", lambda _database_url, blob_url: (pool.database, BlobStore(blob_url)))
    job_id = pool.submit("succeed")
    with pool.database.write() as session:
        claims.claim_next(session, server_id="srv_x", boot_id="run_x", slot="cpu:0", lease_seconds=60.0)
    settings = pool.settings()
    return AttemptSpec(
        job_id=job_id,
        attempt=1,
        kind="succeed",
        params={},
        slot="cpu:0",
        device="cpu",
        database_url=str(settings.database_url),
        blob_url=settings.blob_url,
        scratch=str(pool.folder / "scratch"),
        cache=str(pool.folder / "cache"),
        model_roots=(),
        function="pool_kinds:succeed",
        log=str(pool.folder / "attempt.log"),
    )


@pytest.fixture
def context(pool: Any, spec: AttemptSpec) -> JobContext:
    return JobContext(spec, pool.database, BlobStore(spec.blob_url), Interruption(attempt_runs=True))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The clock of `progress`, which stands still unless it is set."""

    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def overtake(pool: Any, spec: AttemptSpec) -> None:
    """Another server has taken the job over."""
    with pool.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == spec.job_id).values(attempt=2))


def test_progress_is_written_at_most_every_quarter_of_a_second(pool: Any, context: JobContext, clock: Any) -> None:
    for moment, message in ((100.0, "a"), (100.2, "b"), (100.25, "c"), (100.3, "d"), (100.6, "e")):
        clock.now = moment
        context.progress(0.5, message, 1, 2)
    told = [event["message"] for event in pool.events(context.spec.job_id) if event["type"] == "progress"]
    assert told == ["a", "c", "e"]
    job = pool.job(context.spec.job_id)
    assert (job.fraction, job.message, job.step, job.total) == (0.5, "e", 1, 2)


def test_an_interruption_is_seen_also_between_writes(context: JobContext, clock: Any) -> None:
    context.progress(0.1, "a")
    context._interruption.wanted = True
    with pytest.raises(AttemptCancelled):
        context.progress(0.2, "b")
    with pytest.raises(AttemptCancelled):
        context.check_cancelled()


def test_progress_of_a_stale_attempt_writes_nothing(pool: Any, context: JobContext) -> None:
    overtake(pool, context.spec)
    with pytest.raises(AttemptStale):
        context.progress(0.9, "stale")
    assert pool.job(context.spec.job_id).message == ""


def test_progress_of_a_job_being_cancelled_stops_it(pool: Any, context: JobContext) -> None:
    pool.cancel(context.spec.job_id)
    with pytest.raises(AttemptCancelled):
        context.progress(0.9, "late")


def test_a_database_that_is_away_costs_the_progress_only(
    pool: Any, context: JobContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_args: Any, **_options: Any) -> None:
        raise DatabaseUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(claims, "record_progress", away)
        context.progress(0.2, "lost")
    assert pool.job(context.spec.job_id).message == ""


def test_an_adapter_comes_with_its_verified_files(context: JobContext, add_adapter: Any) -> None:
    adapter_id = add_adapter("a", 1)
    stored, directory = context.adapter(adapter_id)
    assert (stored.id, stored.name, stored.base_model) == (adapter_id, "a", "example/base")
    assert stored.base is not None
    assert len(stored.manifest.modules) == 3
    assert sorted(path.name for path in directory.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert directory.is_relative_to(context.scratch)


def test_a_file_from_the_cache_outlives_the_cache(pool: Any, context: JobContext, add_adapter: Any) -> None:
    adapter_id = add_adapter("a", 1)

    class Remote:
        """Gives files in the cache, as a store that downloads does."""

        def materialize(self, sha256: str, cache_dir: Path) -> Path:
            cache_dir.mkdir(parents=True, exist_ok=True)
            target = cache_dir / sha256
            target.write_bytes(b"".join(local.stream(sha256)))
            return target

    local, context.blobs = context.blobs, Remote()  # type: ignore[assignment]
    _, directory = context.adapter(adapter_id)
    for path in Path(context.spec.cache).iterdir():
        path.unlink()
    assert (directory / "adapter_config.json").read_bytes().startswith(b"{")


def test_a_cache_that_loses_every_file_is_an_error_and_no_endless_loop(context: JobContext, add_adapter: Any) -> None:
    adapter_id = add_adapter("a", 1)

    class Forgetful:
        def materialize(self, sha256: str, cache_dir: Path) -> Path:
            return cache_dir / sha256

    context.blobs = Forgetful()  # type: ignore[assignment]
    with pytest.raises(BlobMissing):
        context.adapter(adapter_id)


def test_an_unknown_adapter_is_not_found(context: JobContext) -> None:
    with pytest.raises(NotFound):
        context.adapter("adp_none")


def test_publishing_makes_everything_visible_at_once(
    pool: Any, context: JobContext, add_adapter: Any, write_adapter: Any
) -> None:
    parent = add_adapter("parent", 1)
    new = NewAdapter(
        write_adapter(context.scratch / "out", 5), "made", tags=("x",), parents=(Parent(parent, {"weight": 1.0}),)
    )
    result = publish(context, JobOutcome((new,), {"figure": 1.5}))
    job = pool.job(context.spec.job_id)
    assert (job.state, job.result) == ("succeeded", result)
    assert result["report"] == {"figure": 1.5}
    with pool.database.read() as session:
        row = adapters.get_adapter(session, result["adapters"][0])
        (edge,) = adapters.lineage(session, row.id).edges
    assert (row.name, row.tags, row.origin, row.job_id) == ("made", ["x"], "succeed", context.spec.job_id)
    assert (edge.parent_id, edge.recipe) == (parent, {"weight": 1.0})
    assert all(context.blobs.exists(entry.sha256) for entry in row.files)


@pytest.mark.parametrize(("cause", "error"), [("overtaken", AttemptStale), ("cancelled", AttemptCancelled)])
def test_an_attempt_that_may_not_publish_leaves_no_row(
    pool: Any, context: JobContext, write_adapter: Any, cause: str, error: type[Exception]
) -> None:
    new = NewAdapter(write_adapter(context.scratch / "out", 5), "made")
    if cause == "overtaken":
        overtake(pool, context.spec)
    else:
        pool.cancel(context.spec.job_id)
    with pytest.raises(error):
        publish(context, JobOutcome((new,), {}))
    with pool.database.read() as session:
        assert session.scalars(select(AdapterRow.id)).all() == []
    assert pool.job(context.spec.job_id).result is None


def test_a_result_that_can_not_be_stored_leaves_no_adapter(pool: Any, context: JobContext, write_adapter: Any) -> None:
    good = NewAdapter(write_adapter(context.scratch / "out", 5), "made")
    bad = NewAdapter(write_adapter(context.scratch / "out2", 6), "made", parents=(Parent("adp_none", {}),))
    with pytest.raises(NotFound):
        publish(context, JobOutcome((good, bad), {}))
    with pool.database.read() as session:
        assert session.scalars(select(AdapterRow.id)).all() == []
    assert pool.job(context.spec.job_id).state == "running"


@pytest.mark.parametrize("room", [10, 10**6])
def test_a_result_counts_for_the_owner_of_its_job(
    pool: Any, context: JobContext, write_adapter: Any, room: int
) -> None:
    with pool.database.write() as session:
        key_id = keys.create_key(session, "ci", ["jobs"], limits=keys.KeyLimits(max_bytes=room))[0].id
        session.execute(update(JobRow).where(JobRow.id == context.spec.job_id).values(created_by=key_id))
    new = NewAdapter(write_adapter(context.scratch / "out", 5), "made")
    if room == 10:
        with pytest.raises(QuotaExceeded) as raised:
            publish(context, JobOutcome((new,), {}))
        assert failures.failed(raised.value).retry == "never"
        assert pool.job(context.spec.job_id).state == "running", "nothing was published"
    else:
        publish(context, JobOutcome((new,), {}))
    with pool.database.read() as session:
        sizes = session.scalars(select(AdapterRow.size)).all()
        assert session.get_one(ApiKeyRow, key_id).stored_bytes == sum(sizes)
    assert len(sizes) == (0 if room == 10 else 1)


def test_a_stale_attempt_runs_and_says_so(pool: Any, spec: AttemptSpec) -> None:
    overtake(pool, spec)
    outcome = run_attempt(spec, Interruption(attempt_runs=True))
    assert outcome.state == "stale"
    job = pool.job(spec.job_id)
    assert (job.state, job.result, job.message) == ("running", None, "")


@pytest.mark.parametrize("function", ["no_such_module:run", "pool_kinds:absent", "nonsense"])
def test_a_function_that_can_not_be_loaded_is_an_internal_error(spec: AttemptSpec, function: str) -> None:
    outcome = run_attempt(dataclasses.replace(spec, function=function), Interruption(attempt_runs=True))
    assert outcome.state == "failed"
    assert outcome.error is not None
    assert outcome.error["code"] == "internal_error"


def test_a_log_that_can_not_be_made_fails_the_attempt(pool: Any, spec: AttemptSpec) -> None:
    (pool.folder / "file").write_text("")
    spec = dataclasses.replace(spec, log=str(pool.folder / "file" / "attempt.log"))
    outcome = run_attempt(spec, Interruption(attempt_runs=True))
    assert outcome.error is not None
    assert outcome.error["code"] == "internal_error"


def test_output_goes_to_the_log_and_back_to_where_it_went(spec: AttemptSpec, capfd: Any) -> None:
    run_attempt(dataclasses.replace(spec, function="pool_kinds:bug"), Interruption(attempt_runs=True))
    os.write(2, b"afterwards")
    captured = capfd.readouterr()
    assert "written past Python" not in captured.err
    assert "afterwards" in captured.err
    assert "written past Python" in Path(spec.log).read_text()
    assert "afterwards" not in Path(spec.log).read_text()
    assert not Path(spec.scratch).exists()


def test_an_attempt_reads_numbers_as_earlier_versions_kept_them(
    spec: AttemptSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def function(context: JobContext) -> JobOutcome:
        read.append(parse_parameters("lora", {"alpha": "16"}))
        return JobOutcome()

    monkeypatch.setattr(runtime, "load_function", lambda _: function)
    outcome = run_attempt(spec, Interruption(attempt_runs=True))
    assert outcome.state == "succeeded", outcome
    assert [options.model_dump()["alpha"] for options in read] == [16.0]
    with pytest.raises(RequestInvalid, match="alpha"):
        parse_parameters("lora", {"alpha": "16"})
