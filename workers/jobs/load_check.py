"""The job kind "load_check": an adapter's file is loaded by an engine's own library, and what came of it is counted."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from artifacts.errors import FieldError, RequestInvalid
from artifacts.layout import WEIGHTS_NAME
from artifacts.loading import layout_for
from artifacts.pointers import pointers_below
from artifacts.safetensors_header import read_header
from storage import adapters
from storage.written_downloads import Wish
from train.base_files import BaseFiles
from workers.context import JobContext, JobOutcome
from workers.engines import hollow_models, loaded_numbers, stock_loading
from workers.engines.hollow_models import HollowModel
from workers.written_adapters import downloads_of, write_adapter

WRITTEN, BUILT, LOADED = 0.3, 0.6, 0.9
_LIBRARIES = ("torch", "peft", "transformers", "diffusers")


def run(context: JobContext) -> JobOutcome:
    """Load the adapter that the job's parameters name.

    `params`: {adapter, engine, base_model}; without a base model PEFT gets layers of the adapter's own sizes.

    Raises:
        NotFound: the adapter or the base model is gone since the job was submitted.
        RequestInvalid and its kin: the engine's format can not hold it, or the base model can not be built.
        BlobMissing, BlobCorrupt, BlobStoreUnavailable, DiskFull
        AttemptCancelled, AttemptStale
    """
    params = context.params
    engine = params["engine"]
    with context.database.read() as session:
        row = adapters.get_adapter(session, params["adapter"])
        manifest = adapters.manifest_of(row)
    layout = layout_for(manifest, engine)
    context.progress(0.0, "writing the adapter")
    with pointers_below("/engine", instead_of="/query/format"):
        download = downloads_of(context).of(row, Wish(layout))
    path = write_adapter(context, download, context.scratch / "written")
    weights = path / WEIGHTS_NAME if path.is_dir() else path
    shapes = {key: info.shape for key, info in read_header(weights).tensors.items()}
    context.progress(WRITTEN, "building the base model without weights")
    base: Mapping[str, Any] = {"id": None, "name": None}
    if params.get("base_model") is None:
        hollow = hollow_models.skeleton_of(manifest.modules, shapes)
    else:
        stored, source = context.model_source(params["base_model"], only=".json")
        base = {"id": stored.id, "name": stored.name}
        files = BaseFiles(source.name, source.location, source.revision)
        hollow = _built(engine, files, manifest.config.get("task_type"), shapes)
    context.progress(BUILT, f"loading it with {engine}")
    loaded = stock_loading.load(engine, hollow, path)
    context.progress(LOADED, "counting")
    report: dict[str, Any] = {"verdict": "refuses", "refusal": loaded.refusal}
    if loaded.refusal is None:
        found = loaded_numbers.count(path, weights, loaded.components, hollow.placeholders, stock_loading.ADAPTER)
        report = {"verdict": found.verdict, "refusal": None, **found.report()}
    about = {
        "adapter": row.id,
        "engine": engine,
        "versions": {library: version(library) for library in _LIBRARIES},
        "format": layout,
        "base_model": {**base, "built_from": hollow.kind, "class": type(hollow.target).__name__},
    }
    return JobOutcome(report={**about, **report, "warnings": loaded.warnings})


def _built(engine: str, files: BaseFiles, task: str | None, shapes: Mapping[str, tuple[int, ...]]) -> HollowModel:
    if engine != "diffusers":
        return hollow_models.model_of(files, task, shapes)
    folder = Path(files.location)
    if not folder.is_absolute():  # it was a folder when the job was submitted
        problem = f"the files of {files.name!r} lie on a hub"
        raise RequestInvalid(f"T{problem[1:]}.", errors=[FieldError(hollow_models.POINTER, problem)])
    return hollow_models.pipeline_of(folder, files.name)
