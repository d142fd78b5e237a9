"""A checkpoint: what the method writes into its folder, and the folder as one file, packed and unpacked with care."""

from __future__ import annotations

import errno
import json
import shutil
import tarfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from artifacts.errors import DiskFull, FileBroken

if TYPE_CHECKING:
    from torch import nn

    from train.protocol import TrainMethod

STATE = "method_state.json"
CARRIED = "carried.json"
"""What the job itself wants to have again after an interruption, such as the evaluation before the training."""
_NO_SPACE_BYTES = 1024 * 1024
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def save_method(method: TrainMethod[Any], model: nn.Module, folder: Path) -> None:
    """Write what is trained, and the method's state, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    method.save(model, folder)
    (folder / STATE).write_text(json.dumps(method.state()), encoding="utf-8")


def load_method(method: TrainMethod[Any], model: nn.Module, folder: Path) -> None:
    """Put back what `save_method` wrote."""
    method.load(model, folder)
    method.load_state(json.loads((folder / STATE).read_text(encoding="utf-8")))


@contextmanager
def disk_full_told(when: str, folder: Path) -> Iterator[None]:
    """A full disk is told as one: what writes tensors says it in words of its own.

    Args:
        when: completes "The disk is full".
        folder: on that disk.

    Raises:
        DiskFull
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise _disk_full(when, error) from error
    except (RuntimeError, SafetensorError) as error:
        if shutil.disk_usage(folder).free >= _NO_SPACE_BYTES:
            raise
        raise _disk_full(when, error) from error


def _disk_full(when: str, error: Exception) -> DiskFull:
    return DiskFull(
        f"The disk is full {when}: {error}",
        hint="Free some space. The training goes on from its newest checkpoint.",
    )


def pack(folder: Path, target: Path, without: Set[str] = frozenset()) -> Path:
    """Write the files of `folder`, and of its folders but those of the names in `without`, into the archive `target`.

    Raises OSError (a full disk).
    """
    with tarfile.open(target, "w") as archive:
        for path in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
            place = path.relative_to(folder)
            if without.isdisjoint(place.parts):
                archive.add(path, place.as_posix())
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
