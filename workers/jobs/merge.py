"""The job kind "merge": fetch the adapters, merge them, hand over the merged one with its recipe."""

from __future__ import annotations

from merge import engine
from merge.catalog import parse_parameters
from workers.context import JobContext, JobOutcome
from workers.jobs.merge_inputs import MergeSources

# Shares of the progress bar.
_FETCHED, _MERGED = 0.1, 0.95


def run(context: JobContext) -> JobOutcome:
    """Merge the adapters that the job's parameters name.

    `params`: {adapters: [{id, weight}], method, parameters, name}.

    Raises:
        NotFound: an adapter was deleted since the job was submitted.
        RequestInvalid: the merge can not be done (`merge.plan.plan_merge`).
        AttemptCancelled, AttemptStale
    """
    method: str = context.params["method"]
    options = parse_parameters(method, context.params.get("parameters") or {})
    sources = MergeSources.fetch(context, _FETCHED)
    recipe = sources.recipe(method, options)
    output = context.scratch / "merged"
    report = engine.merge_files(
        sources.inputs(),
        method,
        options,
        output,
        progress=lambda fraction, message: context.progress(_FETCHED + (_MERGED - _FETCHED) * fraction, message),
        # After the device's memory ran out once, main memory takes the job: slower, and it ends.
        device="cpu" if context.reduce_memory else context.device,
        # No job's id: the same merge gives the same bytes.
        lineage=recipe,
    )
    context.progress(_MERGED, "storing the merged adapter")
    return JobOutcome((sources.adapter(output, method, recipe, context.params.get("name")),), report.to_dict())
