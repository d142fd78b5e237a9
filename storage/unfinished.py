"""What the jobs that wait or run still need, by the ids in their parameters."""

from __future__ import annotations

import json
import re

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.tables import JobRow

ADAPTER_ID = re.compile(r"adp_[0-9a-f]{32}")
DATASET_ID = re.compile(r"dat_[0-9a-f]{32}")
_UNFINISHED = ("queued", "running", "cancelling")


def jobs_by_input(session: Session, identifier: re.Pattern[str]) -> dict[str, list[str]]:
    """Id → ids of the unfinished jobs whose parameters name it."""
    found: dict[str, list[str]] = {}
    unfinished = select(JobRow.id, JobRow.params).where(JobRow.state.in_(_UNFINISHED))
    for job_id, params in session.execute(unfinished):
        for named in set(identifier.findall(json.dumps(params))):
            found.setdefault(named, []).append(job_id)
    return found
