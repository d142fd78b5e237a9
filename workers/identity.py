"""Who a server is: an id that outlives its restarts, and a lock that keeps it single."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from artifacts.errors import StateConflict
from storage.ids import new_id


def read_server_id(data_dir: Path) -> str:
    """The id in `<data_dir>/server-id`; made on the first call. Safe when several processes make it at once."""
    path = data_dir / "server-id"
    data_dir.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        server_id = new_id("srv")
        draft = data_dir / f".{server_id}"
        draft.write_text(server_id + "\n", encoding="ascii")
        try:
            os.link(draft, path)
        except FileExistsError:
            pass  # another process was first: its id counts
        finally:
            draft.unlink()
    return path.read_text(encoding="ascii").strip()


class ServerLock:
    """Held by the one running supervisor of a server id; the kernel frees it when the process ends, however it ends."""

    def __init__(self, data_dir: Path, server_id: str) -> None:
        self._path = data_dir / f"supervisor-{server_id}.lock"
        self._server_id = server_id
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Raises StateConflict while another supervisor has this id: each would take the other's jobs for lost."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise StateConflict(
                f"Another server with the id {self._server_id} is running on {self._path.parent}.",
                hint="Stop it, or give this one a data folder of its own and the same database and blob URLs.",
            ) from error
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
