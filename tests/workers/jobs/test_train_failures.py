"""What goes wrong around a training: which error says so, and where the training goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import train_kinds
from tiny_base import sums
from train_jobs import TRAINING, checkpoint_of, params_of, start, weights_of

from artifacts.base_model import inspect_base
from storage import datasets, jobs, models
from workers.kinds import KINDS

pytestmark = pytest.mark.timeout(300)

SECONDS = 150.0
SHORT = TRAINING | {"steps": 6, "learning_rate": 1e-3}


def kinds(name: str) -> dict[str, str]:
    return {**KINDS, "train": f"train_kinds:{name}"}


def test_a_device_that_is_too_small_gets_half_the_rows_at_once(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any
) -> None:
    pool, dataset_id = train_pool, add_dataset()
    assert TRAINING["batch_size"] == train_kinds.DEVICE_ROWS * 2
    plain = pool.submit("train", **params_of(base_id, dataset_id, training=SHORT))
    job_id = pool.submit("train", **params_of(base_id, dataset_id, training=SHORT, trouble=True))
    start(pool, tiny_base, kinds=kinds("little_memory"))
    job, whole = pool.ended(job_id, SECONDS), pool.ended(plain, SECONDS)
    assert job.error is None
    assert (job.state, job.attempt) == ("succeeded", 2)
    (reason,) = [event["reason"] for event in pool.events(job_id) if event.get("reason")]
    assert reason["code"] == "cuda_out_of_memory"
    assert job.resources["reduce_memory"] is True
    halved, expected = weights_of(pool, job), weights_of(pool, whole)
    for name, value in expected.items():
        assert float((halved[name] - value).abs().max()) < 1e-5, name


def test_after_a_loss_that_is_no_number_a_retry_goes_on_from_the_last_checkpoint(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any
) -> None:
    pool, dataset_id = train_pool, add_dataset()
    training = TRAINING | {"steps": 24, "checkpoint_steps": 8}
    trouble = str(pool.folder / "happened")
    failed = pool.submit("train", **params_of(base_id, dataset_id, training=training, trouble=trouble))
    start(pool, tiny_base, kinds=kinds("not_a_number_once"))
    job = pool.ended(failed, SECONDS)
    assert (job.state, job.attempt, job.error["code"]) == ("failed", 1, "training_diverged")
    assert f"The loss of step {train_kinds.BROKEN_STEP} is nan" in job.error["detail"]
    assert "its last checkpoint is of step 16" in job.error["detail"]
    assert "retry" in job.error["hint"]
    assert checkpoint_of(pool, failed).step == 16
    with pool.database.write() as session:
        again = jobs.retry_job(session, failed).id
    whole = pool.submit("train", **params_of(base_id, dataset_id, training=training))
    retried, plain = pool.ended(again, SECONDS), pool.ended(whole, SECONDS)
    assert retried.error is None
    assert retried.result["report"]["resumed_at"] == 16
    assert retried.result["adapters"] == plain.result["adapters"]  # equal content is one adapter
    assert checkpoint_of(pool, failed).step == 16, "the failed job's own is kept for its day"


def test_a_full_disk_at_a_checkpoint_costs_what_was_trained_since_the_one_before(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any
) -> None:
    pool = train_pool
    training = TRAINING | {"steps": 10, "checkpoint_steps": 4}
    job_id = pool.submit("train", **params_of(base_id, add_dataset(), training=training, trouble=True))
    start(pool, tiny_base, kinds=kinds("full_disk_once"))
    job = pool.ended(job_id, SECONDS)
    assert job.error is None
    assert (job.state, job.attempt, job.result["report"]["resumed_at"]) == ("succeeded", 2, 4)
    (reason,) = [event["reason"] for event in pool.events(job_id) if event.get("reason")]
    assert reason["code"] == "disk_full"
    assert "The disk is full at the checkpoint of step 8" in reason["detail"]
    assert "goes on from its newest checkpoint" in reason["hint"]
    assert job.failures == 0, "it got further since"


def test_what_was_removed_while_the_job_waited_is_named(train_pool: Any, tiny_base: Path, add_dataset: Any) -> None:
    pool = train_pool
    folder = Path(shutil.copytree(tiny_base, pool.folder / "roots" / "gone"))
    with pool.database.write() as session:
        base_id = models.add_model(session, inspect_base(folder))[0].id
    kept, deleted = add_dataset(), add_dataset(sums(5), "deleted")
    without_base = pool.submit("train", **params_of(base_id, kept))
    shutil.rmtree(folder)
    with pool.database.write() as session:
        datasets.delete_dataset(session, deleted)
    without_data = pool.submit("train", **params_of(base_id, deleted))
    start(pool, tiny_base, model_roots=(str(folder.parent),))
    job = pool.ended(without_base, SECONDS)
    assert (job.state, job.attempt, job.error["code"]) == ("failed", 1, "not_found")
    assert f"The folder {folder} of the base model 'gone' is not there." in job.error["detail"]
    assert job.error["hint"]
    job = pool.ended(without_data, SECONDS)
    assert (job.state, job.attempt, job.error["code"]) == ("failed", 1, "not_found")
    assert deleted in job.error["detail"]
    assert job.error["hint"]
