"""Train jobs for the tests: their parameters, the pool that runs them, and what they leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from artifacts.base_model import inspect_base
from storage import adapters, models
from storage.blobs import BlobStore
from storage.checkpoints import newest_checkpoint
from storage.job_metrics import metrics_after
from train.options.quantisation import QuantisationOptions
from train.quantised.engine import quantise_base
from workers.kinds import KINDS

STEPS = 60
TRAINING = {"steps": STEPS, "learning_rate": 0.01, "batch_size": 8}


def params_of(base_id: str, dataset_id: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "method": "lora",
        "base_model": base_id,
        "dataset": dataset_id,
        "task": {"type": "causal-lm"},
        "parameters": {"rank": 4},
        "training": TRAINING,
        "evaluation": {"validation_fraction": 0.2},
        "seed": 5,
        "name": None,
    }
    return values | changes


def base_for(pool: Any, tiny_base: Path, base_id: str, method: str) -> str:
    """The base model, or for a method that needs it the same in a few bits."""
    if method != "lq-lora":
        return base_id
    folder = tiny_base.parent / "packed"
    if not folder.exists():
        options = QuantisationOptions(rank=4, budget_bits=3, grid={"blocks": [16], "scales": [16], "scale_bits": [4]})
        quantise_base(tiny_base, folder, options, progress=lambda fraction, message: None)
    with pool.database.write() as session:
        return models.add_model(session, inspect_base(folder))[0].id


def start(pool: Any, tiny_base: Path, **changes: Any) -> Any:
    return pool.start(**{"kinds": KINDS, "model_roots": (str(tiny_base.parent),)} | changes)


def checkpoint_of(pool: Any, job_id: str) -> Any:
    with pool.database.read() as session:
        return newest_checkpoint(session, job_id)


def weights_of(pool: Any, job: Any) -> dict[str, Tensor]:
    """The adapter that a job published."""
    with pool.database.read() as session:
        manifest = adapters.manifest_of(adapters.get_adapter(session, job.result["adapters"][0]))
    entry = next(entry for entry in manifest.files if entry.path.endswith(".safetensors"))
    tensors: dict[str, Tensor] = load_file(
        BlobStore(pool.settings().blob_url).materialize(entry.sha256, pool.folder / "cache")
    )
    return tensors


def series_of(pool: Any, job_id: str) -> list[dict[str, float]]:
    """The numbers of each step."""
    with pool.database.read() as session:
        return [dict(point.numbers) for point, _ in metrics_after(session, job_id, 0, 5000)]
