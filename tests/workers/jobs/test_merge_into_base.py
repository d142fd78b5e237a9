"""A merge into the base model as a job: the result is a registered model that other jobs load."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from artifacts.base_model import inspect_base
from storage import made_models, models
from storage.blobs import BlobStore
from workers.kinds import KINDS

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
SECONDS = 200  # transformers is imported for the first time
IDS = torch.arange(1, 9)[None]


def fetched(pool: Any, model_id: str, folder: Path) -> Path:
    blobs = BlobStore(pool.settings().blob_url)
    folder.mkdir()
    with pool.database.read() as session:
        made = made_models.made_model(session, model_id)
        assert made is not None
        for file in made.files:
            (folder / file.path).symlink_to(blobs.materialize(file.sha256, folder))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def test_the_merged_model_is_registered_and_the_base_of_a_training(
    train_pool: Any, add_adapter: Any, add_dataset: Any, base_id: str, tiny_base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    pool = train_pool
    sides = {"d_in": 32, "d_out": 32, "modules": MODULES, "base_model": inspect_base(tiny_base).name}
    ids = [add_adapter("a", 1, **sides), add_adapter("b", 2, **sides)]
    wanted = {
        "adapters": [{"id": ids[0], "weight": 0.05}, {"id": ids[1], "weight": -0.02}],
        "method": "cat",
        "parameters": {},
    }
    plain = pool.submit("merge", **wanted)
    job_id = pool.submit("merge", **wanted, output="base", base_model=base_id, name="both inside")
    again = pool.submit("merge", **wanted, output="base", base_model=base_id, name="other name")
    pool.start(kinds=KINDS, model_roots=(str(tiny_base.parent),))
    job = pool.ended(job_id, seconds=SECONDS)
    assert job.error is None
    assert (job.result["adapters"], job.result["images"]) == ([], [])
    (model_id,) = job.result["models"]
    assert pool.ended(again, seconds=SECONDS).result["models"] == [model_id]  # the same weights are the same model
    assert job.result["report"]["base"]["rounding"] < 1e-5
    with pool.database.read() as session:
        row = models.get_model(session, model_id)
        made = made_models.made_model(session, model_id)
    assert (row.name, row.source, row.architecture) == ("both inside", "files", "LlamaForCausalLM")
    assert made is not None
    assert made.recipe["base_model"]["id"] == base_id
    assert [item["id"] for item in made.recipe["adapters"]] == ids
    assert {file.path for file in made.files} >= {"config.json", "model.safetensors", "tokenizer.json"}

    folder = fetched(pool, model_id, tmp_path / "model")
    (adapter_id,) = pool.ended(plain, seconds=SECONDS).result["adapters"]
    _, directory = _adapter(pool, adapter_id, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    before = logits(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted_logits = logits(PeftModel.from_pretrained(base, directory))
    found = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert float((found - wanted_logits).abs().max()) < 1e-4 * float(wanted_logits.abs().max())
    assert float((found - before).abs().max()) > 1e-2

    trained = pool.submit(
        "train",
        method="lora",
        base_model=model_id,
        dataset=add_dataset(),
        task="causal-lm",
        parameters={"rank": 2},
        training={"steps": 1, "batch_size": 2},
        evaluation={"validation_fraction": 0.0},
        seed=0,
    )
    assert pool.ended(trained, seconds=SECONDS).error is None


def _adapter(pool: Any, adapter_id: str, folder: Path) -> tuple[Any, Path]:
    from storage import adapters

    blobs = BlobStore(pool.settings().blob_url)
    folder.mkdir()
    with pool.database.read() as session:
        row = adapters.get_adapter(session, adapter_id)
        for file in row.files:
            (folder / file.path).symlink_to(blobs.materialize(file.sha256, folder))
    return row, folder
