"""The job kind "quantize": a base model becomes one in a few bits, with low-rank factors beside it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from train.options.quantisation import QuantisationOptions
from train.quantised.engine import quantise_base
from workers.adapter_names import NAME_LIMIT
from workers.context import JobContext, JobOutcome, NewModel

LIBRARIES = ("rankwise", "torch", "transformers", "scipy")
FETCHED, QUANTISED = 0.02, 0.95


def run(context: JobContext) -> JobOutcome:
    """Quantise the base model that the job's parameters name.

    `params`: {model, method, parameters, name}.

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
    output = context.scratch / "quantised"
    report = quantise_base(
        Path(source.location),
        output,
        options,
        progress=lambda fraction, message: context.progress(FETCHED + (QUANTISED - FETCHED) * fraction, message),
        device="cpu" if context.reduce_memory else context.device,
        notes={"base_model": {"name": stored.name, "weights_digest": stored.ref.weights_digest}},
    ).to_dict()
    context.progress(QUANTISED, "storing the model")
    recipe = {
        "kind": "quantize",
        "method": params.get("method") or "lq-lora",
        "parameters": options.model_dump(mode="json"),
        "base_model": base,
        "versions": {library: version(library) for library in LIBRARIES},
    }
    bits = f"{report['bits_per_weight']:.3g} bits"
    name = params.get("name") or f"{stored.name[: NAME_LIMIT - 20]} ({bits})"
    return JobOutcome(models=(NewModel(output, name, recipe),), report={"model": base, **report})
