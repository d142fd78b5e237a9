"""The wish of a job that its adapter shall be loaded by an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merge.engine_form import fit_engine
from workers.context import JobContext


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
