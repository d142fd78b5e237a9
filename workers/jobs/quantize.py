"""The job kind "quantize": a base model becomes one in a few bits, with low-rank factors beside it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from train.base_files import BaseFiles
from train.data import DataFile
from train.options.fisher import FisherSettings
from train.options.quantisation import QuantisationOptions
from train.quantised.engine import quantise_base, quantised_layers
from train.quantised.fisher_estimate import estimate_fisher, placed
from train.quantised.fisher_weights import Fisher
from train.quantised.source_weights import SourceWeights
from train.settings import EvaluationSettings, TrainingSettings
from train.tasks.catalog import make_task
from train.tasks.protocol import TaskContext
from workers.adapter_names import NAME_LIMIT
from workers.base_models import ModelSource
from workers.context import JobContext, JobOutcome, NewModel

LIBRARIES = ("rankwise", "torch", "transformers", "scipy")
FETCHED, ESTIMATED, QUANTISED = 0.02, 0.3, 0.95


def run(context: JobContext) -> JobOutcome:
    """Quantise the base model that the job's parameters name.

    `params`: {model, method, parameters, fisher, name}.

    Raises:
        NotFound: the base model is gone since the job was submitted.
        RequestInvalid and its kin: see `train.quantised.engine.quantise_base`.
        AttemptCancelled, AttemptStale
    """
    params = context.params
    options = QuantisationOptions.model_validate(params.get("parameters") or {})
    context.progress(0.0, "fetching the base model")
    stored, source = context.model_source(params["model"])
    base = {"id": stored.id, "name": stored.name, "weights_digest": stored.ref.weights_digest}
    begin = FETCHED if params.get("fisher") is None else ESTIMATED
    fisher = None if params.get("fisher") is None else _fisher(context, source, options)
    output = context.scratch / "quantised"
    report = quantise_base(
        Path(source.location),
        output,
        options,
        progress=lambda fraction, message: context.progress(begin + (QUANTISED - begin) * fraction, message),
        device="cpu" if context.reduce_memory else context.device,
        fisher=fisher,
        notes={"base_model": {"name": stored.name, "weights_digest": stored.ref.weights_digest}},
    ).to_dict()
    context.progress(QUANTISED, "storing the model")
    recipe = {
        "kind": "quantize",
        "method": params.get("method") or "lq-lora",
        "parameters": options.model_dump(mode="json"),
        "fisher": params.get("fisher"),
        "base_model": base,
        "versions": {library: version(library) for library in LIBRARIES},
    }
    bits = f"{report['bits_per_weight']:.3g} bits"
    name = params.get("name") or f"{stored.name[: NAME_LIMIT - 20]} ({bits})"
    return JobOutcome(models=(NewModel(output, name, recipe),), report={"model": base, **report})


def _fisher(context: JobContext, source: ModelSource, options: QuantisationOptions) -> Fisher:
    """Estimated on the rows that the job names."""
    wanted = dict(context.params["fisher"])
    dataset, path = context.dataset(wanted.pop("dataset"))
    settings = FisherSettings.model_validate(wanted)
    layers = quantised_layers(SourceWeights(Path(source.location)), options)
    base = BaseFiles(source.name, source.location, source.revision)
    folder = context.scratch / "fisher"
    folder.mkdir()
    task = make_task(settings.task, TaskContext(base, TrainingSettings(steps=1), context.device, options.seed, folder))
    examples = task.read(DataFile(path, dataset.format), EvaluationSettings(validation_fraction=0.0))
    rows = examples.train[: settings.samples]
    model = task.load()
    task.before_training(model)
    found = estimate_fisher(
        task,
        model,
        rows,
        placed(model, list(layers)),
        lambda part: context.progress(FETCHED + (ESTIMATED - FETCHED) * part, "estimating the Fisher"),
    )
    return Fisher(found, settings.heuristic, {"samples": len(rows), "dataset": dataset.id})
