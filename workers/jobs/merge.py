"""The job kind "merge": fetch the adapters, merge them, hand over the result with its recipe."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from merge import engine
from merge.base_output import Dtype, fold_into_base
from merge.catalog import SEARCH, parse_parameters
from workers.adapter_names import NAME_LIMIT
from workers.context import JobContext, JobOutcome, NewModel
from workers.hub_models import local_folder
from workers.jobs import merge_search
from workers.jobs.merge_inputs import MergeSources
from workers.jobs.target_engine import check_for_engine, for_engine

# Shares of the progress bar.
FETCHED, MERGED_INTO_BASE, MERGED = 0.1, 0.3, 0.95


def run(context: JobContext) -> JobOutcome:
    """Merge the adapters that the job's parameters name.

    `params`: {adapters: [{id, weight}], method, parameters, name, output, base_model, dtype, force,
    target_engine, convert}; of the method "search" see `workers.jobs.merge_search.run`.

    Raises:
        NotFound: an adapter was deleted since the job was submitted.
        RequestInvalid: the merge can not be done (`merge.plan.plan_merge`), or the target engine would not load it
            (`merge.engine_form.check_merged`).
        AttemptCancelled, AttemptStale
    """
    method: str = context.params["method"]
    if method == SEARCH.name:
        return merge_search.run(context)
    options = parse_parameters(method, context.params.get("parameters") or {})
    into_base = context.params.get("output") == "base"
    if into_base:
        # The factors are rounded once, together with the weights that they are added to.
        options = options.model_copy(update={"output_dtype": "float32"})
    sources = MergeSources.fetch(context, FETCHED)
    if context.params.get("convert"):
        sources = sources.converted(context)
    recipe = sources.recipe(method, options)
    output = context.scratch / "merged"
    merged = MERGED_INTO_BASE if into_base else MERGED
    report = engine.merge_files(
        sources.inputs(),
        method,
        options,
        output,
        progress=lambda fraction, message: context.progress(FETCHED + (merged - FETCHED) * fraction, message),
        # After the device's memory ran out once, main memory takes the job: slower, and it ends.
        device="cpu" if context.reduce_memory else context.device,
        # No job's id: the same merge gives the same bytes.
        lineage=recipe,
        check=partial(check_for_engine, context),
    ).to_dict()
    if sources.conversions:
        report["conversions"] = [dict(item) for item in sources.conversions]
    if into_base:
        model, folded = fold(context, sources, output, recipe)
        return JobOutcome(models=(model,), report={**report, "base": folded})
    output, told = for_engine(context, output)
    report |= told
    context.progress(MERGED, "storing the merged adapter")
    return JobOutcome((sources.adapter(output, method, recipe, context.params.get("name")),), report)


def fold(
    context: JobContext, sources: MergeSources, adapter: Path, recipe: Mapping[str, Any]
) -> tuple[NewModel, dict[str, Any]]:
    """The base model with the merged adapter inside, and the report on its weights."""
    stored, source = context.model_source(context.params["base_model"])
    dtype: Dtype = context.params.get("dtype") or "auto"
    force = bool(context.params.get("force"))
    output = context.scratch / "model"
    context.progress(MERGED_INTO_BASE, "fetching the base model")
    folder = local_folder(source, context.check_cancelled)
    report = fold_into_base(
        folder,
        adapter,
        output,
        dtype=dtype,
        force=force,
        progress=lambda fraction, message: context.progress(
            MERGED_INTO_BASE + (MERGED - MERGED_INTO_BASE) * fraction, message
        ),
    ).to_dict()
    context.progress(MERGED, "storing the model")
    base = {"id": stored.id, "name": stored.name, "weights_digest": stored.ref.weights_digest}
    if stored.ref.source == "hub":
        base["commit"] = folder.name  # as the hub's cache calls it
    names = ", ".join(item.name for item, _, _ in sources.items)
    model = NewModel(
        directory=output,
        name=context.params.get("name") or f"{stored.name} + {names}"[:NAME_LIMIT],
        recipe={**recipe, "output": "base", "base_model": base, "dtype": dtype, "force": force},
    )
    return model, {"model": base, **report}
