"""Whether what a client gave back can be averaged. Imports no torch: the service checks while a client waits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.errors import FieldError, FileBroken
from artifacts.pointers import pointer_token
from artifacts.safetensors_header import SafetensorsHeader, TensorInfo, read_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPE = "F32"
"""Of all tensors that clients train."""
HEADER_BYTES = 1024**2
"""Most bytes of the header of what a client gives."""
_SHOWN = 80


def upload_limit(trained: Mapping[str, TensorInfo]) -> int:
    """Most bytes of a file with these tensors."""
    return 8 + HEADER_BYTES + sum(info.end - info.begin for info in trained.values())


def check_update(update: Path, start: Path, trained: Mapping[str, TensorInfo], max_norm: float | None = None) -> float:
    """How far a client's tensors are from the round's start: Frobenius norm over all of them.

    Args:
        update: the safetensors file that the client gave.
        start: the one of the common adapter that the round began with.
        trained: those tensors of `start` that clients train.

    Raises:
        FileBroken: no safetensors file; other names, shapes or types; a number that is not finite; or farther away
            than `max_norm`. Each finding points to `/file/` and the name of the tensor.
    """
    # Not at the top: the service imports this module, and does without numpy until a client gives something.
    import numpy as np

    header = read_header(update, max_header_bytes=HEADER_BYTES)
    _raise(list(_odd(header, trained)))
    problems, square = [], 0.0
    for name, before in trained.items():
        given = _values(update, header.tensors[name])
        if not np.isfinite(given).all():
            place = [int(index) for index in np.argwhere(~np.isfinite(given))[0]]
            problems.append(FieldError(_pointer(name), f"has numbers that are not finite, the first at {place}"))
            continue
        away = given.astype(np.float64) - _values(start, before)
        square += float(np.vdot(away, away))
    _raise(problems)
    norm = math.sqrt(square)
    if max_norm is not None and norm > max_norm:
        _raise([FieldError("/file", f"moved by {norm:.6g}, farther than max_update_norm, {max_norm:g}")])
    return norm


def _odd(header: SafetensorsHeader, trained: Mapping[str, TensorInfo]) -> Iterator[FieldError]:
    for name in sorted(trained.keys() - header.tensors.keys()):
        yield FieldError(_pointer(name), "is missing")
    for name, info in sorted(header.tensors.items()):
        wanted = trained.get(name)
        if wanted is None:
            yield FieldError(_pointer(name), "is not asked for")
        elif info.dtype != wanted.dtype:
            yield FieldError(_pointer(name), f"is {info.dtype}, not {wanted.dtype}")
        elif info.shape != wanted.shape:
            yield FieldError(_pointer(name), f"has the shape {list(info.shape)}, not {list(wanted.shape)}")


def _values(path: Path, info: TensorInfo) -> NDArray[Any]:
    import numpy as np

    if info.elements == 0:
        return np.empty(info.shape, "<f4")
    return np.memmap(path, "<f4", "r", info.begin, info.shape)


def _pointer(name: str) -> str:
    return "/file/" + pointer_token(name[:_SHOWN])


def _raise(problems: list[FieldError]) -> None:
    if problems:
        raise FileBroken(
            f"{problems[0].pointer} {problems[0].message}.",
            hint="Give back the tensors of the round that are trained, under their names, in float32.",
            errors=problems,
        )
