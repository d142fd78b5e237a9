"""Follows the training inside a transfer: its last two checkpoints stay in a folder of the transfer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transfer.bench import TransferObserver

KEPT = 2
_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class TrainingFollower:
    """A `train.engine.TrainObserver`. A checkpoint appears under its name when it is whole.

    Attributes:
        folder: of the checkpoints.
        observer: follows the transfer.
        told: whether it hears of the steps.
    """

    folder: Path
    observer: TransferObserver
    told: bool = True

    def newest(self) -> Path | None:
        """The checkpoint of the latest step, if there is one."""
        found = self._checkpoints()
        return found[-1] if found else None

    def stop_wanted(self) -> bool:
        return self.observer.stop_wanted()

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        if self.told:
            self.observer.step(step, total, values)

    def progress(self, fraction: float, message: str) -> None:
        del fraction, message

    def checkpoint(self, folder: Path, step: int) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"{step:09d}"
        partial = target.with_suffix(_PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder, partial)
        if not target.exists():
            partial.rename(target)
        for old in self._checkpoints()[:-KEPT]:
            shutil.rmtree(old)
        self.observer.kept()
        return True

    def _checkpoints(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.suffix != _PARTIAL)
