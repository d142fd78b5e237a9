"""The job kind "convert": an adapter of another type becomes a plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge.conversion import ConversionReport, Progress, convert_to_lora
from merge.convertible import PACKED, Need, need_of
from storage import made_models, models
from storage.adapters import Parent
from workers.adapter_names import NAME_LIMIT
from workers.context import JobContext, JobOutcome, NewAdapter, StoredAdapter
from workers.jobs import unpacked_base

LIBRARIES = ("rankwise", "torch")


def run(context: JobContext) -> JobOutcome:
    """Convert the adapter that the job's parameters name.

    `params`: {adapter, to, rank, max_error, base_model, dtype, name}.

    Raises:
        NotFound: the adapter was deleted, or the base model is gone, since the job was submitted.
        MergeRefused and its kin: it can not be done (`merge.conversion.convert_to_lora`).
        AttemptCancelled, AttemptStale
    """
    params = context.params
    context.progress(0.0, "fetching the adapter")
    stored, directory = context.adapter(params["adapter"])
    if params["to"] != "lora":
        return unpacked_base.convert(context, stored, directory)
    rank = params.get("rank")
    recipe = {
        "to": params["to"],
        "rank": rank,
        "base_model": params.get("base_model"),
        "weights_digest": stored.manifest.weights_digest,
        "versions": {library: version(library) for library in LIBRARIES},
    }
    output = context.scratch / "converted"
    told = to_lora(
        context,
        stored,
        directory,
        output,
        rank=rank,
        max_error=params.get("max_error"),
        base_model=params.get("base_model"),
        lineage={"from": stored.id, **recipe},
        progress=lambda fraction, message: context.progress(0.05 + 0.9 * fraction, message),
    ).to_dict()
    base_model, model_id = stored.base_model, stored.model_id
    if stored.manifest.method == PACKED:
        base_model, model_id = _original(context, stored)
        told |= _quantisation_told(stored)
    context.progress(0.95, "storing the adapter")
    converted = NewAdapter(
        directory=output,
        name=params.get("name") or f"{stored.name} (lora)"[-NAME_LIMIT:],
        description=f"{stored.name}, a {stored.manifest.method}, as a plain LoRA.",
        base_model=base_model,
        model_id=model_id,
        parents=(Parent(stored.id, recipe),),
    )
    return JobOutcome((converted,), told)


def to_lora(
    context: JobContext,
    stored: StoredAdapter,
    directory: Path,
    output: Path,
    *,
    base_model: str | None,
    rank: int | None = None,
    max_error: float | None = None,
    lineage: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write the adapter as a plain LoRA into the new folder `output`.

    Args:
        base_model: id of the registered base model, for types that need it.

    Raises:
        NotFound: the base model is gone.
        MergeRefused and its kin: as `merge.conversion.convert_to_lora`.
    """
    fingerprint, base = None, None
    if base_model is not None:
        if needed_of(stored) == "weights":
            model, source = context.model_source(base_model)
            base, fingerprint = Path(source.location), model.ref.fingerprint
        else:
            fingerprint = context.stored_model(base_model).ref.fingerprint
    return convert_to_lora(
        directory,
        output,
        rank=rank,
        max_error=max_error,
        fingerprint=fingerprint,
        base=base,
        lineage=lineage,
        progress=progress,
    )


def needed_of(stored: StoredAdapter) -> Need | None:
    """What the conversion of the adapter needs of its base model."""
    return need_of(stored.manifest.method, stored.manifest.modules, stored.manifest.report.facts.typed)


def _original(context: JobContext, stored: StoredAdapter) -> tuple[str | None, str | None]:
    """Name and id of the base model that the adapter's quantised one was made of; the id is None where it is not known.

    What was trained beside quantised weights is written as a change of the original ones.
    """
    with context.database.read() as session:
        made = None if stored.model_id is None else made_models.made_model(session, stored.model_id)
        base = {} if made is None else dict(made.recipe.get("base_model") or {})
        known = base.get("id") and models.find_model(session, str(base["id"]))
        if known:
            return known.name, known.id
    noted = stored.manifest.config.get("quantised_from")
    return (str(noted["name"]) if isinstance(noted, dict) and noted.get("name") else None), None


def _quantisation_told(stored: StoredAdapter) -> dict[str, Any]:
    """How far the adapter on the original weights is from what was trained: by what quantising had lost."""
    lost = stored.manifest.config.get("quantisation_error")
    warning = (
        "The LoRA is the change that the training made, on the original weights: they differ from the quantised ones "
        "with their first factors by quantisation_error, so the model is not quite the one that was trained."
    )
    return {"quantisation_error": lost, "warnings": [warning]}
