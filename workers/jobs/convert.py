"""The job kind "convert": an adapter of another type becomes a plain LoRA."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from merge.conversion import convert_to_lora
from merge.convertible import CONVERTIBLE
from storage.adapters import Parent
from workers.adapter_names import NAME_LIMIT
from workers.context import JobContext, JobOutcome, NewAdapter

LIBRARIES = ("rankwise", "torch")


def run(context: JobContext) -> JobOutcome:
    """Convert the adapter that the job's parameters name.

    `params`: {adapter, to, rank, base_model, name}.

    Raises:
        NotFound: the adapter was deleted, or the base model is gone, since the job was submitted.
        MergeRefused and its kin: it can not be done (`merge.conversion.convert_to_lora`).
        AttemptCancelled, AttemptStale
    """
    params = context.params
    context.progress(0.0, "fetching the adapter")
    stored, directory = context.adapter(params["adapter"])
    rank = params.get("rank")
    recipe = {
        "to": params["to"],
        "rank": rank,
        "base_model": params.get("base_model"),
        "weights_digest": stored.manifest.weights_digest,
        "versions": {library: version(library) for library in LIBRARIES},
    }
    fingerprint, base = None, None
    if params.get("base_model") is not None:
        if CONVERTIBLE.get(stored.manifest.method) == "weights":
            model, source = context.model_source(params["base_model"])
            base, fingerprint = Path(source.location), model.ref.fingerprint
        else:
            fingerprint = context.stored_model(params["base_model"]).ref.fingerprint
    output = context.scratch / "converted"
    report = convert_to_lora(
        directory,
        output,
        rank=rank,
        fingerprint=fingerprint,
        base=base,
        lineage={"from": stored.id, **recipe},
        progress=lambda fraction, message: context.progress(0.05 + 0.9 * fraction, message),
    )
    context.progress(0.95, "storing the adapter")
    converted = NewAdapter(
        directory=output,
        name=params.get("name") or f"{stored.name} (lora)"[-NAME_LIMIT:],
        description=f"{stored.name}, a {stored.manifest.method}, as a plain LoRA.",
        base_model=stored.base_model,
        model_id=stored.model_id,
        parents=(Parent(stored.id, recipe),),
    )
    return JobOutcome((converted,), report.to_dict())
