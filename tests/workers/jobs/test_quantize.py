"""The job kind "quantize": a registered model becomes a registered model in a few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from storage import made_models, models
from workers.kinds import KINDS

SECONDS = 200  # transformers is imported for the first time
GRID = {"bits": [2, 3, 4], "scale_bits": [4], "blocks": [16], "scales": [16]}
PARAMETERS = {"rank": 4, "budget_bits": 3.0, "grid": GRID}


def test_the_quantised_model_is_registered_with_its_files(
    train_pool: Any, base_id: str, tiny_base: Path, add_dataset: Any
) -> None:
    pool = train_pool
    fisher = {"dataset": add_dataset(), "samples": 20}
    weighted = pool.submit("quantize", model=base_id, parameters=PARAMETERS, fisher=fisher)
    wanted = {"model": base_id, "method": "lq-lora", "parameters": PARAMETERS}
    job_id = pool.submit("quantize", **wanted, name="tiny in three bits")
    again = pool.submit("quantize", **wanted)
    small = pool.submit("quantize", model=base_id, parameters=PARAMETERS | {"budget_bits": 2.1})
    pool.start(kinds=KINDS, model_roots=(str(tiny_base.parent),))
    job = pool.ended(job_id, seconds=SECONDS)
    assert job.error is None
    report = job.result["report"]
    assert report["bits_per_weight"] <= 3.0
    assert report["model"]["id"] == base_id
    felt = pool.ended(weighted, seconds=SECONDS)
    assert felt.error is None
    assert felt.result["report"]["fisher"] == {"heuristic": "two-sided", "samples": 20, "dataset": fisher["dataset"]}
    assert all(item["weighted_error"] > 0 for item in felt.result["report"]["modules"])
    assert felt.result["report"]["relative_error"] > report["relative_error"]  # it is not what was made small
    (model_id,) = job.result["models"]
    assert felt.result["models"] != [model_id]
    assert pool.ended(again, seconds=SECONDS).result["models"] == [model_id]  # the same bytes are the same model
    failed = pool.ended(small, seconds=SECONDS)
    assert failed.state == "failed"
    assert "smallest budget" in failed.error["detail"]
    with pool.database.read() as session:
        row = models.get_model(session, model_id)
        made = made_models.made_model(session, model_id)
    assert (row.name, row.source, row.quantisation["rank"]) == ("tiny in three bits", "files", 4)
    assert made is not None
    assert made.recipe["base_model"]["id"] == base_id
    assert {file.path for file in made.files} >= {"config.json", "model.safetensors", "start_factors.safetensors"}
