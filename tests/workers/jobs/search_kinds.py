"""A merge job whose worker dies in the first attempt, when so many trials of its search are kept as `name` says."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from workers.checkpointing import Checkpoints
from workers.context import JobContext, JobOutcome
from workers.jobs import merge, merge_search


def dies_after(context: JobContext) -> JobOutcome:
    """`kill -9` of its own process right after the checkpoint of that step; the report tells what it tried itself."""
    publish, measured = Checkpoints.publish, merge_search._Search.tried
    own: list[int] = []

    def count(self: Any, wanted: Any, *args: Any) -> Any:
        own.append(wanted.number)
        return measured(self, wanted, *args)

    def publish_and_die(self: Any, folder: Path, step: int, *args: Any) -> bool:
        kept = publish(self, folder, step, *args)
        if step == int(context.params["name"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return kept

    if context.spec.attempt == 1:
        Checkpoints.publish = publish_and_die  # type: ignore[method-assign]
    merge_search._Search.tried = count  # type: ignore[method-assign]
    outcome = merge.run(context)
    return replace(outcome, report={**outcome.report, "tried": own})
