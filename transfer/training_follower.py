"""Follows the training inside a transfer: its last two checkpoints stay in a folder of the transfer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

KEPT = 2
_PARTIAL = ".partial"


class TrainingFollower:
    """A `train.engine.TrainObserver`. A checkpoint appears under its name when it is whole."""

    def __init__(self, folder: Path, stop_wanted: Callable[[], bool]) -> None:
        self._folder, self._stop_wanted = folder, stop_wanted

    def newest(self) -> Path | None:
        """The checkpoint of the latest step, if there is one."""
        found = self._checkpoints()
        return found[-1] if found else None

    def stop_wanted(self) -> bool:
        return self._stop_wanted()

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        del step, total, values

    def progress(self, fraction: float, message: str) -> None:
        del fraction, message

    def checkpoint(self, folder: Path, step: int) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._folder / f"{step:09d}"
        partial = target.with_suffix(_PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder, partial)
        if not target.exists():
            partial.rename(target)
        for old in self._checkpoints()[:-KEPT]:
            shutil.rmtree(old)
        return True

    def _checkpoints(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(path for path in self._folder.iterdir() if path.suffix != _PARTIAL)
