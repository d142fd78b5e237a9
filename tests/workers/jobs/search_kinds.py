"""A merge job whose worker dies in the first attempt, when so many trials of its search are kept as `name` says."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from workers.checkpointing import Checkpoints
from workers.context import JobContext, JobOutcome
from workers.jobs import merge


def dies_after(context: JobContext) -> JobOutcome:
    """`kill -9` of its own process right after the checkpoint of that step."""
    publish = Checkpoints.publish

    def publish_and_die(self: Any, folder: Path, step: int, *args: Any) -> bool:
        kept = publish(self, folder, step, *args)
        if step == int(context.params["name"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return kept

    if context.spec.attempt == 1:
        Checkpoints.publish = publish_and_die  # type: ignore[method-assign]
    return merge.run(context)
