"""A disk that runs full: a small file system where one may be mounted, else a limit on the servers' files."""

from __future__ import annotations

import contextlib
import errno
import subprocess
from pathlib import Path

import psutil

SIZE = "192m"
_CHUNK = 1 << 20
_LIMIT = 16 << 10  # bytes of a file, where the limit stands for the full disk


class Disk:
    """The folder of a round. `fill` and `free` are the adversary's.

    Args:
        mount: whether to try to mount.
    """

    def __init__(self, folder: Path, *, mount: bool = True) -> None:
        self.folder = folder
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
        self.mounted = mount and subprocess.run(command, capture_output=True, check=False).returncode == 0
        self._ballast = folder / "ballast"
        self._limited: list[tuple[psutil.Process, tuple[int, int]]] = []

    def fill(self, processes: list[psutil.Process]) -> str:
        """Leave no space, or let these processes, and what they start, write no larger files."""
        if self.mounted:
            return f"{self._fill()} bytes were free"
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                before = process.rlimit(psutil.RLIMIT_FSIZE)
                process.rlimit(psutil.RLIMIT_FSIZE, (_LIMIT, before[1]))
                self._limited.append((process, before))
        return f"no larger files for {len(self._limited)} processes"

    def _fill(self) -> int:
        written = 0
        size = _CHUNK
        with self._ballast.open("wb", buffering=0) as file:
            while size:
                try:
                    written += file.write(b"\0" * size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    size //= 2
        return written

    def free(self) -> None:
        """Undo `fill`, also for what was started meanwhile."""
        self._ballast.unlink(missing_ok=True)
        limited, self._limited = self._limited, []
        for process, before in limited:
            with contextlib.suppress(psutil.NoSuchProcess):
                for member in [process, *process.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.rlimit(psutil.RLIMIT_FSIZE, before)

    def close(self) -> None:
        self.free()
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
