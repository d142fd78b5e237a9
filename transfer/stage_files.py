"""The outputs of a transfer's stages: files named by their content, and for every unit of work which one it gave.

A unit that was done with the same input is not done again. A file is written beside its place, flushed and renamed, so
that a crash at any moment leaves a whole unit or none. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transfer.identity import canonical_digest


class StageFiles:
    """A folder of stage outputs; a job may keep and restore it as a whole."""

    def __init__(self, folder: Path) -> None:
        self._objects, self._units = folder / "objects", folder / "units"
        for directory in (self._objects, self._units):
            directory.mkdir(parents=True, exist_ok=True)

    def unit(self, name: str, given: Any, make: Callable[[], bytes]) -> bytes:
        """What the unit gave for this input, or gives now.

        Args:
            name: of the unit, such as filter-00003.
            given: JSON of everything that decides the output.
        """
        digest = canonical_digest(given)
        found = self._read(name, digest)
        if found is not None:
            return found
        data = make()
        self._write(name, digest, data)
        return data

    def json_unit(self, name: str, given: Any, make: Callable[[], Any]) -> Any:
        """As `unit`, of a JSON value."""
        return json.loads(self.unit(name, given, lambda: json.dumps(make(), ensure_ascii=True).encode()))

    def put(self, data: bytes) -> str:
        """Keep bytes under their SHA-256, which is returned."""
        digest = hashlib.sha256(data).hexdigest()
        if self.get(digest) is None:
            _write_whole(self._objects / digest, data)
        return digest

    def get(self, digest: str) -> bytes | None:
        """The bytes of that SHA-256; None if they are missing or not what they should be."""
        try:
            data = (self._objects / digest).read_bytes()
        except FileNotFoundError:
            return None
        return data if hashlib.sha256(data).hexdigest() == digest else None

    def forget(self, name: str) -> None:
        """The unit will be done again."""
        (self._units / f"{name}.json").unlink(missing_ok=True)

    def is_done(self, name: str, given: Any) -> bool:
        return self._read(name, canonical_digest(given)) is not None

    def _read(self, name: str, digest: str) -> bytes | None:
        try:
            record = json.loads((self._units / f"{name}.json").read_text(encoding="utf-8"))
            return self.get(record["output"]) if record["input"] == digest else None
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def _write(self, name: str, digest: str, data: bytes) -> None:
        record = {"input": digest, "output": self.put(data)}
        _write_whole(self._units / f"{name}.json", json.dumps(record).encode())


def _write_whole(target: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
