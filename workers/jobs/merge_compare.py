"""The job kind "merge_compare": one pool of adapters by several methods, one table, and the winners as adapters."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from artifacts.errors import RequestInvalid
from artifacts.labels import labels_of
from merge.catalog import parse_parameters
from merge.comparison import Candidate, Compared, compare_files
from merge.comparison_report import comparison_report, rank_by
from workers.context import JobContext, JobOutcome, NewAdapter
from workers.jobs.merge_evaluation import MergeEvaluation
from workers.jobs.merge_inputs import MergeSources

# Shares of the progress bar; with an evaluation the merges end earlier.
_FETCHED, _MERGED_TO_MEASURE, _MERGED = 0.1, 0.4, 0.95


def run(context: JobContext) -> JobOutcome:
    """Merge the adapters by every candidate and tell how the results differ.

    `params`: {adapters: [{id, weight}], candidates: [{method, parameters, label}], evaluation, publish, name}.

    Raises: as `workers.jobs.merge.run`; and of an evaluation, what is wrong with the dataset or the base model.
    """
    started = time.monotonic()
    sources = MergeSources.fetch(context, _FETCHED)
    candidates = [_candidate(sources, label, item) for label, item in _labelled(context.params["candidates"])]
    evaluation = context.params.get("evaluation")
    merged = _MERGED if evaluation is None else _MERGED_TO_MEASURE
    compared = compare_files(
        sources.inputs(),
        candidates,
        context.scratch / "compared",
        progress=lambda fraction, message: context.progress(_FETCHED + (merged - _FETCHED) * fraction, message),
        device="cpu" if context.reduce_memory else context.device,
    )
    report = comparison_report(compared, time.monotonic() - started)
    if evaluation is not None:
        _measure(context, compared, report, evaluation)
        report["seconds"] = round(time.monotonic() - started, 3)
    chosen = _chosen(report["ranking"], context.params.get("publish") or "none")
    published = [item for item in compared if item.candidate.label in chosen]
    for row in report["candidates"]:
        labels = [item.candidate.label for item in published]
        row["adapter"] = labels.index(row["label"]) if row["label"] in labels else None
    context.progress(_MERGED, "storing the winners" if published else "done")
    name = context.params.get("name")
    adapters = [_adapter(sources, item, name, several=len(published) > 1) for item in published]
    return JobOutcome(tuple(adapters), report)


def _measure(
    context: JobContext, compared: Sequence[Compared], report: dict[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Measure every candidate on the base model, and rank them by the metric, in the report; one without finite figures
    gets a problem in their place, and no rank.

    Raises RequestInvalid: none has any.
    """
    part, share = 0, (_MERGED - _MERGED_TO_MEASURE) / (len(compared) + 1)

    def tick(done: int, total: int) -> None:
        what = "the base model" if part == 0 else compared[part - 1].candidate.label
        fraction = _MERGED_TO_MEASURE + share * (part + done / total)
        context.progress(fraction, f"measuring {what}: row {done} of {total}", done, total)

    context.progress(_MERGED_TO_MEASURE, "loading the base model")
    evaluation = MergeEvaluation(context, wanted, tick)
    order = {}
    problems = []
    for item, row in zip(compared, report["candidates"], strict=True):
        part += 1
        try:
            found = evaluation.of(item.directory)
        except RequestInvalid as error:
            problems.append(error.detail)
            row["problem"] = error.detail
            continue
        row |= found
        order[row["label"]] = evaluation.order(found["figures"])
    if not order:
        raise RequestInvalid(f"None of the {len(compared)} merges could be measured. The first: {problems[0]}")
    rank_by(report, evaluation.metric, order)
    report["evaluation"] = evaluation.report()


def _labelled(candidates: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    return list(zip(labels_of(candidates), candidates, strict=True))


def _candidate(sources: MergeSources, label: str, item: Mapping[str, Any]) -> Candidate:
    method: str = item["method"]
    options = parse_parameters(method, item.get("parameters") or {})
    return Candidate(label, method, options, sources.recipe(method, options))


def _chosen(ranking: Sequence[str], publish: str) -> Sequence[str]:
    """Labels of the candidates that become adapters."""
    return {"none": (), "best": ranking[:1], "all": ranking}[publish]


def _adapter(sources: MergeSources, item: Compared, name: str | None, *, several: bool) -> NewAdapter:
    candidate = item.candidate
    if name is not None and several:
        name = f"{name} ({candidate.label})"[:200]
    recipe = candidate.lineage or {}
    return sources.adapter(item.directory, candidate.method, recipe, name)
