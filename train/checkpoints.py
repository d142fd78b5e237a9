"""A checkpoint as one file: what the loop wrote into a folder, packed without compression, and unpacked with care."""

from __future__ import annotations

import tarfile
from pathlib import Path

from artifacts.errors import FileBroken

STATE = "method_state.json"
CARRIED = "carried.json"
"""What the job itself wants to have again after an interruption, such as the evaluation before the training."""


def pack(folder: Path, target: Path) -> Path:
    """Write the files of `folder` into the archive `target`. Raises OSError (a full disk)."""
    with tarfile.open(target, "w") as archive:
        for path in sorted(entry for entry in folder.iterdir() if entry.is_file()):
            archive.add(path, path.name)
    return target


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack what `pack` wrote into the new `folder`.

    Raises:
        FileBroken: it is no such archive.
    """
    folder.mkdir(parents=True)
    try:
        with tarfile.open(archive, "r:") as opened:
            opened.extractall(folder, filter="data")
    except tarfile.TarError as error:
        raise FileBroken(f"The checkpoint can not be unpacked: {error}.") from error
    return folder
