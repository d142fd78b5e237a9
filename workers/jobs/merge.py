"""The job kind "merge": fetch the adapters, merge them, hand over the merged one with its recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from artifacts.base_model import BaseModelRef
from merge import engine
from merge.catalog import parse_parameters
from merge.options import MergeOptions
from merge.plan import MergeInput
from storage.adapters import Parent
from workers.adapter_names import default_name
from workers.context import JobContext, JobOutcome, NewAdapter, StoredAdapter

LIBRARIES = ("rankwise", "torch", "numpy", "numba")
UNKNOWN_BASE = "unknown"
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
    sources = _fetch(context)
    inputs = [(_input(stored, weight), directory) for stored, weight, directory in sources]
    recipe = _recipe(method, options, [item for item, _ in inputs])
    output = context.scratch / "merged"
    report = engine.merge_files(
        inputs,
        method,
        options,
        output,
        progress=lambda fraction, message: context.progress(_FETCHED + (_MERGED - _FETCHED) * fraction, message),
        # After the device's memory ran out once, main memory takes the job: slower, and it ends.
        device="cpu" if context.reduce_memory else context.device,
        lineage={"job": context.spec.job_id, **recipe},
    )
    context.progress(_MERGED, "storing the merged adapter")
    stored = [item for item, _, _ in sources]
    merged = NewAdapter(
        directory=output,
        name=context.params.get("name") or default_name([item.name for item in stored], method),
        description=f"Merged from {len(stored)} adapters with {method}.",
        base_model=next((item.base_model for item in stored if item.base_model is not None), None),
        model_id=_common_model([item.model_id for item in stored]),
        parents=tuple(
            Parent(item.id, {"weight": weight, "position": position, **recipe})
            for position, (item, weight, _) in enumerate(sources)
        ),
    )
    return JobOutcome((merged,), report.to_dict())


def _fetch(context: JobContext) -> list[tuple[StoredAdapter, float, Path]]:
    asked: Sequence[Mapping[str, Any]] = context.params["adapters"]
    sources = []
    for position, item in enumerate(asked):
        context.progress(_FETCHED * position / len(asked), "fetching adapters", position, len(asked))
        stored, directory = context.adapter(item["id"])
        weight = item.get("weight")
        sources.append((stored, 1.0 if weight is None else float(weight), directory))
    return sources


def _input(stored: StoredAdapter, weight: float) -> MergeInput:
    manifest = stored.manifest
    return MergeInput(
        id=stored.id,
        name=stored.name,
        digest=manifest.weights_digest,
        modules=manifest.modules,
        method=manifest.method,
        mergeable=manifest.mergeable,
        refusal=manifest.refusal,
        base=stored.base or BaseModelRef.named(UNKNOWN_BASE),
        weight=weight,
    )


def _recipe(method: str, options: MergeOptions, inputs: Sequence[MergeInput]) -> dict[str, Any]:
    """All that is needed to do the merge again: every effective parameter and the versions that computed it."""
    parameters = json.loads(options.model_dump_json())
    return {
        "method": method,
        "parameters": parameters,
        "seed": parameters.get("seed"),
        "adapters": [{"id": item.id, "weight": item.weight, "weights_digest": item.digest} for item in inputs],
        "versions": {library: version(library) for library in LIBRARIES},
    }


def _common_model(ids: Sequence[str | None]) -> str | None:
    """The registered base model, when all adapters have the same one."""
    return ids[0] if len(set(ids)) == 1 else None
