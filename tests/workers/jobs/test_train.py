"""The job kind "train", from a stored dataset to a stored adapter, in a real worker process that may be killed."""

from __future__ import annotations

import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
from test_methods import OF_WORDS
from train_jobs import STEPS, TRAINING, base_for, checkpoint_of, params_of, start
from transcript_rows import TASK

from artifacts.errors import AttemptStale
from storage import adapters, checkpoints, job_metrics
from storage.blobs import BlobStore
from storage.checkpoints import record_checkpoint
from storage.job_metrics import metrics_after
from workers.jobs.train_plans import LIBRARIES


def test_a_training_stores_an_adapter_with_its_report_and_its_series(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any
) -> None:
    pool = train_pool
    job_id = pool.submit("train", **params_of(base_id, add_dataset(), name="mine"))
    start(pool, tiny_base)
    job = pool.ended(job_id)
    assert job.error is None
    report = job.result["report"]
    assert (report["method"], report["steps"], report["resumed_at"]) == ("lora", STEPS, 0)
    assert report["versions"].keys() == set(LIBRARIES)
    assert report["evaluation"]["after"]["loss"] < 0.7 * report["evaluation"]["before"]["loss"]
    assert report["evaluation"]["difference"]["loss"]["high"] < 0
    assert report["reload"]["largest_difference"] <= 1e-5 < report["reload"]["effect"]
    with pool.database.read() as session:
        row = adapters.get_adapter(session, job.result["adapters"][0])
        points = metrics_after(session, job_id, 0, 1000)
    assert (row.name, row.rank, row.origin, row.job_id) == ("mine", 4, "train", job_id)
    assert (row.model_id, row.base_model, row.mergeable) == (base_id, tiny_base.name, True)
    assert [point.step for point, _ in points] == list(range(1, STEPS + 1))
    losses = [point.numbers["loss"] for point, _ in points]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert points[0][0].numbers["learning_rate"] == pytest.approx(0.01)
    assert all(point.numbers["gradient_norm"] > 0 for point, _ in points)


def test_layers_of_several_ranks_are_written_as_the_engine_reads_them(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any
) -> None:
    pool = train_pool
    wanted = params_of(
        base_id,
        add_dataset(),
        method="increlora",
        parameters={"target_rank": 2, "interval": 1, "export": "patterns"},
        training=TRAINING | {"steps": 12},
        target_engine="vllm",
    )
    job_id = pool.submit("train", **wanted)
    start(pool, tiny_base)
    job = pool.ended(job_id)
    assert job.error is None
    with pool.database.read() as session:
        manifest = adapters.manifest_of(adapters.get_adapter(session, job.result["adapters"][0]))
    assert {(module.rank, module.scaling) for module in manifest.modules} == {(manifest.rank, 1.0)}
    told = job.result["report"]["target_engine"]
    assert (told["engine"], told["loads"], told["findings"]) == ("vllm", True, [])
    assert "modules are filled up to rank" in told["adapted"][1]
    assert manifest.rank > 2


PARAMETERS: dict[str, dict[str, Any]] = {
    "adalora": {"initial_rank": 4, "target_rank": 2, "dropout": 0.1},
    "allora": {"rank": 4},
    "flexora": {
        "rank": 4,
        "dropout": 0.1,
        "selection": "top_k",
        "top_k": 1,
        "validation_rows": 8,
        "validation_batches": 2,
    },
    "increlora": {"initial_rank": 1, "target_rank": 2, "interval": 10, "dropout": 0.1},
    "loftq": {"rank": 4},
    "lq-lora": {},
    "prompt-tuning": {"virtual_tokens": 4},
    "smora": {"rank": 8, "active_rank": 2, "dropout": 0.1},
}
"""Of those methods that have no dropout, or no rank of that name."""


def kill_and_compare(
    pool: Any, tiny_base: Path, base_id: str, dataset_id: str, method: str, wait_until: Any, **more: Any
) -> Any:
    """Run the same training twice, once killed after its first checkpoint; returns the killed job."""
    changes = {"method": method, "parameters": PARAMETERS.get(method, {"rank": 4, "dropout": 0.1}), **more}
    base_id = base_for(pool, tiny_base, base_id, method)
    whole = pool.submit("train", **params_of(base_id, dataset_id, training=TRAINING, **changes))
    start(pool, tiny_base)
    assert pool.ended(whole).error is None

    often = TRAINING | {"checkpoint_steps": 4}
    killed = pool.submit("train", **params_of(base_id, dataset_id, training=often, **changes))
    row = wait_until(lambda: checkpoint_of(pool, killed), "the first checkpoint")
    pid = pool.attempts(killed)[0].pid
    os.kill(pid, signal.SIGKILL)
    job = pool.ended(killed)
    assert job.error is None
    assert job.attempt == 2
    assert [attempt.outcome for attempt in pool.attempts(killed)] == ["lost", "succeeded"]
    assert job.result["report"]["resumed_at"] >= row.step
    # Equal content is one adapter, or one model: the same bytes.
    made = [{kind: found.result.get(kind) for kind in ("adapters", "models")} for found in (job, pool.job(whole))]
    assert made[0] == made[1]
    with pool.database.read() as session:
        first = [point.numbers for point, _ in metrics_after(session, whole, 0, 1000)]
        second = [point.numbers for point, _ in metrics_after(session, killed, 0, 1000)]
    assert first == second
    evaluations = [pool.job(job_id).result["report"]["evaluation"] for job_id in (whole, killed)]
    assert evaluations[0] == evaluations[1]
    return job


def test_a_killed_training_goes_on_and_ends_with_the_same_bytes(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any, wait_until: Any
) -> None:
    job = kill_and_compare(train_pool, tiny_base, base_id, add_dataset(), "lora", wait_until)
    # Nothing of the checkpoints is left when the result is there, but what the killed process was about to record.
    assert checkpoint_of(train_pool, job.id) is None
    blobs = BlobStore(train_pool.settings().blob_url)
    paths = [blobs.materialize(digest, train_pool.folder) for digest in blobs.iter_digests()]
    assert sum(tarfile.is_tarfile(path) for path in paths) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(set(OF_WORDS) - {"lora"}))
def test_every_method_survives_a_kill(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any, wait_until: Any, method: str
) -> None:
    kill_and_compare(train_pool, tiny_base, base_id, add_dataset(), method, wait_until)


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [{"rank": 4, "dropout": 0.1}, {"mode": "full"}], ids=["lora", "full"])
def test_a_killed_training_on_transcripts_ends_with_the_same_bytes(
    train_pool: Any, tiny_kmer_bert: Path, kmer_bert_id: str, add_fasta: Any, wait_until: Any, parameters: Any
) -> None:
    task = TASK | {"views": "full", "max_length": 64}
    more = {"task": task, "parameters": parameters, "evaluation": {"validation_fraction": 0.3}}
    kill_and_compare(train_pool, tiny_kmer_bert, kmer_bert_id, add_fasta(), "lora-bert", wait_until, **more)


def test_the_worker_of_a_training_is_replaced(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any, wait_until: Any, has_ended: Any
) -> None:
    pool = train_pool
    short = TRAINING | {"steps": 2}
    job_id = pool.submit("train", **params_of(base_id, add_dataset(), training=short))
    start(pool, tiny_base)
    assert pool.ended(job_id).error is None
    pid = pool.attempts(job_id)[0].pid
    wait_until(lambda: has_ended(pid), "the process that trained has ended")


def test_a_cancelled_training_stops_between_two_steps(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any, wait_until: Any
) -> None:
    pool = train_pool
    endless = TRAINING | {"steps": 1_000_000, "schedule": "constant"}
    job_id = pool.submit("train", **params_of(base_id, add_dataset(), training=endless))
    start(pool, tiny_base)
    wait_until(lambda: pool.job(job_id).step, "the first steps")
    pool.cancel(job_id)
    job = pool.ended(job_id)
    assert (job.state, job.result) == ("cancelled", None)


def test_a_server_that_stops_leaves_a_checkpoint_to_the_next(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any, wait_until: Any
) -> None:
    pool = train_pool
    job_id = pool.submit("train", **params_of(base_id, add_dataset(), training=TRAINING | {"steps": 400}))
    supervisor = start(pool, tiny_base)
    wait_until(lambda: pool.job(job_id).step, "the first steps")
    supervisor.stop()
    stopped_at = checkpoint_of(pool, job_id)
    assert stopped_at is not None
    assert pool.job(job_id).state == "queued"
    start(pool, tiny_base)
    job = pool.ended(job_id)
    assert job.error is None
    assert job.result["report"]["resumed_at"] == stopped_at.step


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"parameters": {"rank": 33}}, "invalid_request", "rank 33 is above 16"),
        ({"parameters": {"target_modules": ["query"]}}, "invalid_request", "q_proj"),
        ({"training": {"steps": 3, "precision": "float16"}}, "invalid_request", "float16 needs a GPU"),
        ({"task": {"type": "causal-lm", "max_length": 12}}, "file_broken", "row 1: 14 tokens, 12 are allowed"),
        ({"training": {"steps": 50, "learning_rate": 10, "max_grad_norm": 0}}, "training_diverged", " of step "),
    ],
)
def test_what_can_not_be_trained_fails_once_and_says_why(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any, changes: Any, code: str, words: str
) -> None:
    pool = train_pool
    job_id = pool.submit("train", **params_of(base_id, add_dataset(), **changes))
    start(pool, tiny_base)
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.error["code"]) == ("failed", 1, code)
    assert words in str(job.error)


def test_a_stale_attempt_leaves_no_checkpoint_and_no_numbers(train_pool: Any) -> None:
    job_id = train_pool.submit("train")
    with pytest.raises(AttemptStale), train_pool.database.write() as session:
        record_checkpoint(session, job_id, 1, step=3, sha256="0" * 64, size=1)
    with pytest.raises(AttemptStale), train_pool.database.write() as session:
        job_metrics.record_metrics(session, job_id, 1, [job_metrics.Point(1, {"loss": 1.0})])
    with train_pool.database.read() as session:
        assert checkpoints.newest_checkpoint(session, job_id) is None
        assert metrics_after(session, job_id, 0, 10) == []
