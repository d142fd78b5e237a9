"""A training on several devices: two ranks do what one does, and end together whatever happens to one of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import train_kinds
from test_methods import OF_WORDS, PARAMETERS, USUAL
from train_jobs import TRAINING, base_for, checkpoint_of, params_of, series_of, start, weights_of

from workers.kinds import KINDS

pytestmark = pytest.mark.timeout(400)

TOLERANCE = 1e-5
"""Two ranks add the same gradients in another order: rounding, which Adam does not amplify in so few steps."""
TWO = "cpu:2"
SECONDS = 150.0
FEW = TRAINING | {"steps": 9, "gradient_accumulation": 2, "learning_rate": 1e-3}


def ranks_of(supervisor: Any, job_id: str) -> tuple[int, int]:
    """The processes of the two ranks: the worker, and what it forked."""
    (leader,) = {slot["pid"] for slot in supervisor.status() if slot["job_id"] == job_id}
    (other,) = psutil.Process(leader).children()
    return leader, other.pid


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in OF_WORDS if name != "lora")]
)
def test_two_ranks_train_what_one_trains_with_the_same_batches(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any, method: str
) -> None:
    """51 rows are 6 batches of 8 and one of 3, which the ranks share as 1 and 2; completions differ in length."""
    # Without dropout, whose masks are others on every rank.
    sizes = {name: value for name, value in PARAMETERS.get(method, USUAL).items() if name != "dropout"}
    base_id = base_for(train_pool, tiny_base, base_id, method)
    params = params_of(base_id, add_dataset(), method=method, training=FEW, parameters=sizes)
    check_ranks(train_pool, tiny_base, params)


@pytest.mark.slow
def test_two_ranks_draw_the_noise_of_one_for_the_same_images(
    train_pool: Any, tiny_pipeline: Path, pipeline_id: str, add_images: Any
) -> None:
    """Of 27 images 8 are taken at a time, 2 or 3 at the end of an epoch, in two epochs and a half."""
    task = {"type": "text-to-image", "resolution": 32, "noise_offset": 0.1, "prompt_dropout": 0.5}
    training = FEW | {"gradient_accumulation": 1}
    check_ranks(train_pool, tiny_pipeline, params_of(pipeline_id, add_images(27), task=task, training=training))


def check_ranks(pool: Any, base: Path, params: dict[str, Any]) -> None:
    jobs = [pool.submit("train", resources={"devices": devices}, **params) for devices in (1, 2)]
    start(pool, base, devices=TWO)
    one, two = (pool.ended(job_id, SECONDS) for job_id in jobs)
    assert one.error is None
    assert two.error is None
    first, second = weights_of(pool, one), weights_of(pool, two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert float((value - second[name]).abs().max()) < TOLERANCE, name
    losses = [[point["loss"] for point in series_of(pool, job.id)] for job in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    reports = [job.result["report"] for job in (one, two)]
    assert [report["devices"] for report in reports] == [1, 2]
    assert reports[1]["evaluation"]["after"]["loss"] == pytest.approx(reports[0]["evaluation"]["after"]["loss"], 1e-4)
    assert reports[1]["data"] == reports[0]["data"]


@pytest.mark.slow
def test_a_killed_rank_has_the_training_go_on_from_its_checkpoint_to_the_same_bytes(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any, wait_until: Any
) -> None:
    """With dropout, whose generators are others on every rank: all of them are in the checkpoint."""
    pool, dataset_id = train_pool, add_dataset()
    changes = {"parameters": {"rank": 4, "dropout": 0.1}, "method": "lora"}
    training = TRAINING | {"steps": 30, "checkpoint_steps": 4}
    supervisor = start(pool, tiny_base, devices=TWO)
    killed = pool.submit("train", {"devices": 2}, **params_of(base_id, dataset_id, training=training, **changes))
    row = wait_until(lambda: checkpoint_of(pool, killed), "the first checkpoint", SECONDS)
    _, other = ranks_of(supervisor, killed)
    os.kill(other, signal.SIGKILL)
    whole = pool.submit("train", {"devices": 2}, **params_of(base_id, dataset_id, training=training, **changes))
    job, uninterrupted = pool.ended(killed, SECONDS), pool.ended(whole, SECONDS)
    assert job.error is None
    assert job.attempt == 2
    assert job.result["report"]["resumed_at"] >= row.step
    assert job.result["adapters"] == uninterrupted.result["adapters"]  # equal content is one adapter
    assert series_of(pool, killed) == series_of(pool, whole)


@pytest.mark.slow
def test_a_stop_ends_all_ranks_after_the_same_step_with_a_checkpoint(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any, wait_until: Any, has_ended: Any
) -> None:
    pool = train_pool
    endless = TRAINING | {"steps": 1_000_000, "schedule": "constant"}
    job_id = pool.submit("train", {"devices": 2}, **params_of(base_id, add_dataset(), training=endless))
    supervisor = start(pool, tiny_base, devices=TWO)
    wait_until(lambda: pool.job(job_id).step, "the first steps", SECONDS)
    pids = ranks_of(supervisor, job_id)
    supervisor.stop()  # as a server does that is stopped: the attempt has time for a checkpoint
    stopped_at = checkpoint_of(pool, job_id)
    assert stopped_at is not None
    assert pool.job(job_id).state == "queued"
    wait_until(lambda: all(has_ended(pid) for pid in pids), "both ranks have ended")
    assert len(series_of(pool, job_id)) == stopped_at.step


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_rank_stops_all_with_one_error(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any, wait_until: Any
) -> None:
    pool = train_pool
    training = TRAINING | {"steps": 30, "checkpoint_steps": 10}
    params = params_of(base_id, add_dataset(), training=training, trouble=str(pool.folder / "happened"))
    job_id = pool.submit("train", {"devices": 2}, **params)
    supervisor = start(pool, tiny_base, devices=TWO, kinds={**KINDS, "train": "train_kinds:not_a_number_once"})
    job = pool.ended(job_id, SECONDS)
    assert (job.state, job.attempt, job.error["code"]) == ("failed", 1, "training_diverged")
    assert f"The loss of step {train_kinds.BROKEN_STEP} is nan" in job.error["detail"]
    assert "its last checkpoint is of step 20" in job.error["detail"]
    wait_until(lambda: all(slot["state"] == "idle" for slot in supervisor.status()), "both slots are idle", SECONDS)
