"""The wish of a job that its adapter shall be loaded by an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merge.engine_form import check_merged, fit_engine
from merge.plan import MergePlan
from workers.context import JobContext


def check_for_engine(context: JobContext, plan: MergePlan) -> None:
    """Refuse a merge whose result the job's `target_engine` will not load: what could not be known before.

    Raises:
        RequestInvalid: pointers are those of a merge's request.
    """
    engine = context.params.get("target_engine")
    if engine is not None:
        check_merged(plan, engine)


def for_engine(context: JobContext, directory: Path) -> tuple[Path, dict[str, Any]]:
    """The adapter in `directory` as the job's `target_engine` loads it, and what the report says of that.

    Raises:
        DiskFull, ReloadMismatch
    """
    engine = context.params.get("target_engine")
    if engine is None:
        return directory, {}
    fitted, told = fit_engine(directory, engine, context.scratch / "for-engine")
    return fitted, {"target_engine": told}
