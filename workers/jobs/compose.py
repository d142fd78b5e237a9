"""The job kind "compose": one image with its recipe, masks and report; or, by a method that fuses, one adapter."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from compose.catalog import find_method
from compose.fused_adapter import fuse_with
from compose.recipe import LIBRARIES
from compose.request import CompositionRequest
from compose.validation import validate
from storage.adapters import Parent
from workers.adapter_names import default_name
from workers.context import JobContext, JobOutcome, NewAdapter
from workers.jobs.kitchen import FETCHED, SAMPLED, Kitchen, teller


def run(context: JobContext) -> JobOutcome:
    """Make the image, or the adapter, that the job's parameters describe.

    `params`: {base_model, concepts, styles, prompt, negative_prompt, method, parameters, seed, width, height, steps,
    precision, preview_every, name}.

    Raises:
        NotFound: the base model or an adapter is not there any more.
        ComposeRefused and its kin: they do not fit each other. CompositionDiverged: NaN, naming the step.
        ImageFlagged: by the safety checker.
        AttemptCancelled, AttemptStale
    """
    method: str = context.params["method"]
    kitchen = Kitchen.of(context)
    request = kitchen.request(method, context.params.get("parameters") or {})
    if find_method(method).capabilities.yields == "adapter":
        return _fused(kitchen, request)
    found = kitchen.compose(request, teller(context, FETCHED, SAMPLED))
    label = context.params.get("name") or method
    image = kitchen.image(request, found, context.scratch / "image", label=label)
    return JobOutcome(images=(image,), report=image.facts.report)


def _fused(kitchen: Kitchen, request: CompositionRequest) -> JobOutcome:
    """One adapter of all, with its lineage."""
    context = kitchen.context
    validated = validate(request, yields="adapter")
    output = context.scratch / "fused"
    found = fuse_with(kitchen.loaded, request, validated, output, teller(context, FETCHED, SAMPLED))
    report = {**found.report, **kitchen.circumstances()}
    parts = [*context.params["concepts"], *(context.params.get("styles") or ())]
    recipe: dict[str, Any] = {
        "method": request.method,
        "parameters": report["parameters"],
        "prompt": request.prompt,
        "parts": parts,
        "seed": request.seed,
        "steps": request.steps,
        "base_model": context.params["base_model"],
        "versions": {library: version(library) for library in LIBRARIES},
    }
    names = [stored.name for stored, _ in kitchen.adapters.values()]
    adapter = NewAdapter(
        directory=output,
        name=context.params.get("name") or default_name(names, request.method, "fusion"),
        description=f"Fused from {len(names)} adapters with {request.method}.",
        base_model=kitchen.model.name,
        model_id=kitchen.model.id,
        parents=tuple(
            Parent(item["adapter"], {"position": position, "weight": item.get("weight", 1.0), **recipe})
            for position, item in enumerate(parts)
        ),
    )
    return JobOutcome((adapter,), report)
