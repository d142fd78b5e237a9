"""A training that gives plain LoRAs beside its own adapter, in a real worker process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from train_jobs import TRAINING, params_of, start

from storage import adapters

SECONDS = 200
ROWS = [
    {"prompt": f"{kind} {number} is ", "completion": str(number + (1 if kind == "after" else -1)), "task": kind}
    for number in range(10, 40)
    for kind in ("after", "before")
]


@pytest.mark.slow
def test_the_loras_of_single_tasks_are_stored_as_adapters(
    train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Any
) -> None:
    pool = train_pool
    job_id = pool.submit(
        "train",
        **params_of(
            base_id,
            add_dataset(ROWS),
            name="mixed",
            method="smora",
            parameters={"rank": 6, "active_rank": 2, "fold": "per_task"},
            training=TRAINING | {"steps": 3},
            evaluation={"validation_fraction": 0.3, "group_column": "task"},
        ),
    )
    start(pool, tiny_base)
    job = pool.ended(job_id, SECONDS)
    assert job.error is None
    with pool.database.read() as session:
        rows = [adapters.get_adapter(session, adapter) for adapter in job.result["adapters"]]
    assert [(row.name, row.method, row.mergeable) for row in rows] == [
        ("mixed", "smora", False),
        ("mixed (after)", "lora", True),
        ("mixed (before)", "lora", True),
    ]
    (first, _) = job.result["report"]["evaluation"]["groups"]
    assert first == "after"
    assert f"{job.result['report']['own']['evaluation']['folds'][0]['figures']['loss']:.4g}" in rows[1].description
