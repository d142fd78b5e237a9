"""The staging folder: what a killed server left in it goes when it is old enough to be nobody's."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import structlog

from app.uploads import STAGING_PREFIX

_log = structlog.stdlib.get_logger(__name__)


def sweep_staging(staging: Path, max_age_hours: float) -> int:
    """Remove upload folders that nobody has touched for `max_age_hours`; younger ones may be another server's.

    Returns:
        The number of folders that went.
    """
    oldest = time.time() - max_age_hours * 3600
    removed = 0
    for folder in staging.glob(f"{STAGING_PREFIX}*"):
        try:
            if _last_touched(folder) >= oldest:
                continue
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue  # its server, or another sweep, was quicker
        removed += 1
    if removed:
        _log.info("staging_swept", folders=removed)
    return removed


def _last_touched(folder: Path) -> float:
    """The newest modification in the folder: an upload that goes on keeps its own file fresh."""
    return max([folder.stat().st_mtime, *(entry.stat().st_mtime for entry in folder.iterdir())])
