"""Trainings that make their adapter transferable, in real worker processes that may be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from train_jobs import checkpoint_of, params_of, start

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "transfer"))

from tiny_models import order, teach_lists, write_llama

from artifacts.base_model import inspect_base
from artifacts.errors import BlobMissing
from storage import adapters, datasets, jobs, models, sealed_inputs, transferables
from storage.blobs import BlobStore

# One way of it over HTTP is among the fast tests (tests/app/test_transferable.py).
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SECONDS = 200.0
STEPS = 12
SEEDS = [order(number)[0] for number in (1, 10, 20, 31, 45)]
TRAINING = {"steps": STEPS, "learning_rate": 0.01, "batch_size": 8}
CANARY = "canary-of-the-data"
ROWS = [
    {"prompt": f"Message: {order(number)[0]} now{CANARY * (number == 7)}\nCode:", "completion": order(number)[1]}
    for number in range(45)
]
ASKED: dict[str, Any] = {
    "seeds": len(SEEDS),
    "task": "orders",
    "format": {"template": "Message: {x}\nCode:"},
    "discriminator": {"input_tokens": 24, "generation_batch": 16, "training": {**TRAINING, "steps": 24}},
}


@pytest.fixture(scope="session")
def list_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base that goes on with lists, and has a token for yes and one for no."""
    return teach_lists(write_llama(tmp_path_factory.mktemp("list-base")), steps=60)


@pytest.fixture
def base_id(train_pool: Any, list_base: Path) -> str:
    with train_pool.database.write() as session:
        return models.add_model(session, inspect_base(list_base))[0].id


def submit(pool: Any, params: dict[str, Any]) -> str:
    with pool.database.write() as session:
        job_id = jobs.create_job(session, "train", params).id
        sealed_inputs.seal(session, job_id, {"seeds": SEEDS})
    return job_id


def kept_by(pool: Any, job: Any) -> Any:
    with pool.database.read() as session:
        return transferables.get(session, job.result["adapters"][0])


def everything_stored(pool: Any) -> bytes:
    """All blobs and the database, as bytes; a blob that is removed meanwhile is not among them."""
    blobs = BlobStore(pool.settings().blob_url)
    stored = [pool.database.path.read_bytes()]
    for digest in blobs.iter_digests():
        with contextlib.suppress(BlobMissing, FileNotFoundError):
            stored.append(blobs.materialize(digest, pool.folder).read_bytes())
    return b"".join(stored)


def test_an_adapter_keeps_what_a_transfer_needs_and_nothing_of_its_data(
    train_pool: Any, list_base: Path, base_id: str, add_dataset: Any, wait_until: Any
) -> None:
    pool, dataset_id = train_pool, add_dataset(ROWS)
    assert CANARY.encode() in everything_stored(pool)
    longer = {**ASKED["discriminator"], "training": {**TRAINING, "steps": 80}}
    asked = ASKED | {"drop_dataset": True, "discriminator": longer}
    job_id = submit(pool, params_of(base_id, dataset_id, training=TRAINING, transferable=asked))
    start(pool, list_base)
    job = pool.ended(job_id, SECONDS)
    assert job.error is None
    told = job.result["report"]["transferable"]
    assert told["auc"] >= 0.9
    assert {name: told[name] for name in ("task", "seeds", "inputs", "invented")} == {
        "task": "orders",
        "seeds": 5,
        "inputs": 45,
        "invented": 45,
    }
    assert (told["trained"], told["held_out"]) == (36, 9)
    assert job.result["report"]["dataset_dropped"] is True

    row = kept_by(pool, job)
    assert (row.seeds, row.task, row.size, row.auc) == (SEEDS, "orders", 45, told["auc"])
    assert row.prompt_format == {"template": "Message: {x}\nCode:", "chat": False, "system": None}
    assert row.recipe == {"task": "orders", "chat": False}
    assert row.discriminator_base["model_id"] == base_id
    assert len(row.discriminator_base["tokenizer_digest"]) == 64
    assert row.settings["options"]["rank"] == 4, "as the adapter has it"
    names = {file.path for file in row.files}
    assert names >= {"adapter_config.json", "adapter_model.safetensors"}
    with pool.database.read() as session:
        published = adapters.manifest_of(adapters.get_adapter(session, job.result["adapters"][0]))
        weights = {file.sha256 for file in published.files if file.path.endswith(".safetensors")}
        assert weights.isdisjoint(file.sha256 for file in row.files)
        assert session.get(datasets.DatasetRow, dataset_id) is None
    # the bytes go right after the job has ended, and not in its transaction
    wait_until(lambda: CANARY.encode() not in everything_stored(pool), "the dataset's bytes are gone")
    texts = [str(event) for event in pool.events(job_id)] + [str(job.params), str(job.result)]
    assert not any(seed in text for seed in SEEDS for text in texts)


def test_killed_trainings_end_with_the_same_adapter_and_discriminator(
    train_pool: Any, list_base: Path, base_id: str, add_dataset: Any, wait_until: Any
) -> None:
    pool, dataset_id = train_pool, add_dataset(ROWS)
    plain = submit(pool, params_of(base_id, dataset_id, training=TRAINING, transferable=ASKED))
    start(pool, list_base)
    job = pool.ended(plain, SECONDS)
    assert job.error is None
    row = kept_by(pool, job)
    whole = ([file.sha256 for file in row.files], row.auc, row.discriminator_digest)
    with pool.database.write() as session:
        identity = adapters.get_adapter(session, row.adapter_id).identity_digest
        adapters.delete_adapter(session, row.adapter_id)
        assert transferables.get(session, row.adapter_id) is None

    often = TRAINING | {"checkpoint_steps": 4}
    asked = {**ASKED, "discriminator": {**ASKED["discriminator"], "training": {**often, "steps": 24}}}
    killed = submit(pool, params_of(base_id, dataset_id, training=often, transferable=asked))
    # In the adapter's training, among the invented inputs (each batch is a checkpoint), and in the discriminator's.
    for attempt, step in enumerate((4, STEPS + 2, STEPS + 6)):
        wait_until(
            lambda step=step: (row := checkpoint_of(pool, killed)) and row.step >= step, f"checkpoint {step}", SECONDS
        )
        os.kill(pool.attempts(killed)[attempt].pid, signal.SIGKILL)
        wait_until(lambda attempt=attempt: pool.attempts(killed)[attempt].outcome == "lost", "the kill was noticed")
        if attempt < 2:
            wait_until(lambda attempt=attempt: len(pool.attempts(killed)) > attempt + 1, "the next attempt")
    job = pool.ended(killed, SECONDS)
    assert job.error is None
    assert [attempt.outcome for attempt in pool.attempts(killed)] == ["lost", "lost", "lost", "succeeded"]
    row = kept_by(pool, job)
    assert ([file.sha256 for file in row.files], row.auc, row.discriminator_digest) == whole
    with pool.database.read() as session:
        assert adapters.get_adapter(session, row.adapter_id).identity_digest == identity


def test_a_dataset_that_others_have_come_to_need_is_kept(
    train_pool: Any, list_base: Path, base_id: str, add_dataset: Any
) -> None:
    pool, dataset_id = train_pool, add_dataset(ROWS)
    params = params_of(base_id, dataset_id, training=TRAINING, transferable=ASKED | {"drop_dataset": True})
    first, second = submit(pool, params), submit(pool, params)
    start(pool, list_base)
    jobs_done = [pool.ended(job_id, SECONDS) for job_id in (first, second)]
    assert [job.error for job in jobs_done] == [None, None]
    kept, dropped = (job.result["report"] for job in jobs_done)
    assert (kept["dataset_dropped"], dropped["dataset_dropped"]) == (False, True)
    assert second in str(kept["warnings"])
    assert "was transferable before" in str(dropped["warnings"]), "the same adapter again"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": None, "discriminator": {"chat": True}, "task": "x"}, None),
        ({"format": {"template": "Order: {x}"}}, "45 of 45 rows give no input of the task"),
        ({"format": {"template": "Message: {x}\nCode:", "chat": True}}, "it is no chat, and the format is"),
    ],
)
def test_what_the_rows_do_not_allow_is_refused_before_anything_is_trained(
    train_pool: Any, list_base: Path, base_id: str, add_dataset: Any, changes: dict[str, Any], words: str | None
) -> None:
    pool = train_pool
    short = {**TRAINING, "steps": 2}
    asked = ASKED | {"discriminator": {**ASKED["discriminator"], "training": short}} | changes
    job_id = submit(pool, params_of(base_id, add_dataset(ROWS), training=short, transferable=asked))
    start(pool, list_base)
    job = pool.ended(job_id, SECONDS)
    if words is None:
        assert job.error is None
        return
    assert (job.state, job.attempt, job.error["code"]) == ("failed", 1, "invalid_request")
    assert words in str(job.error)
    assert CANARY not in str(job.error)
    assert job.step is None
