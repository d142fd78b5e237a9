"""Which files of a folder elsewhere are those of one adapter, told by their names before any is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from artifacts.errors import FieldError, FormatUnknown
from artifacts.layout import WEIGHTS_NAME
from artifacts.upload import MAX_FILES, is_weights, role_of

_NAMED = 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file elsewhere: its path there, bytes and SHA-256 (hex) as far as they are told."""

    path: str
    size: int | None = None
    sha256: str | None = None


def choose(files: Sequence[RemoteFile], path: str | None, place: str) -> list[RemoteFile]:
    """The files of the adapter at `path`: that file, or those right in that folder.

    Args:
        place: of the path in the request, a JSON pointer.

    Raises:
        FormatUnknown: none there, or several of which none is the adapter's; the places of others are told.
    """
    folder = (path or "").strip("/")
    exact = [file for file in files if file.path == folder]
    if exact:
        return exact
    here = [file for file in files if file.path.rpartition("/")[0] == folder and role_of(PurePosixPath(file.path))]
    weights = [name for name in (PurePosixPath(file.path).name for file in here) if is_weights(PurePosixPath(name))]
    where = f"the folder {folder!r}" if folder else "the top"
    if not weights:
        elsewhere = [path for path in (PurePosixPath(file.path) for file in files) if is_weights(path)]
        others = sorted({"the top" if path.parent == PurePosixPath() else str(path.parent) for path in elsewhere})
        raise _refused(
            place,
            f"there is no file of weights in {where}",
            f"Give its path. Files of weights lie in: {', '.join(others[:_NAMED])}." if others else None,
        )
    if len(weights) > 1 and WEIGHTS_NAME not in weights:
        raise _refused(
            place,
            f"there are several files of weights in {where}",
            f"Give the path of one: {', '.join(weights[:_NAMED])}.",
        )
    if WEIGHTS_NAME in weights:
        paths = {file: PurePosixPath(file.path) for file in here}
        here = [file for file, path in paths.items() if not is_weights(path) or path.name == WEIGHTS_NAME]
    if len(here) > MAX_FILES:
        raise _refused(place, f"there are {len(here)} files in {where}; at most {MAX_FILES} are taken", None)
    return here


def _refused(place: str, problem: str, hint: str | None) -> FormatUnknown:
    return FormatUnknown(f"T{problem[1:]}.", hint=hint, errors=[FieldError(place, problem)])
