"""A process beside the fork server that outlives it by a moment, to end what its workers have started.

When the fork server is killed, the kernel ends the workers (PR_SET_PDEATHSIG), but not the processes that their jobs
have started; and the server, which could, may have been killed with it or be frozen. The guardian knows the process
group of every worker, and kills those that are left when the pipe from the fork server closes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

_PR_SET_NAME = 15
_NAME = b"guardian"  # what `ps` shows


class Guardian:
    """Seen from the fork server, which must be single-threaded when it makes one.

    Args:
        foreign_fds: descriptors of the fork server that the guardian must not hold open.
    """

    def __init__(self, foreign_fds: Sequence[int]) -> None:
        reader, writer = os.pipe()
        self.fd = writer
        """To be closed in everything that the fork server forks later."""
        self._pid = os.fork()
        if self._pid == 0:
            _guard(reader, [writer, *foreign_fds])
        os.close(reader)

    def watch(self, pid: int) -> None:
        """The worker `pid` leads a process group from now on."""
        self._tell(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        """The group has been killed; its leader is about to be reaped, and the number free again."""
        self._tell(f"-{pid}\n")

    def close(self) -> None:
        """No group is left: the guardian ends, and is reaped."""
        os.close(self.fd)
        os.waitpid(self._pid, 0)

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it: the others still do their part
            os.write(self.fd, line.encode("ascii"))


def _guard(reader: int, foreign_fds: Sequence[int]) -> NoReturn:
    try:
        os.setsid()
        for fd in foreign_fds:
            os.close(fd)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_NAME, _NAME, 0, 0, 0)
        groups: set[int] = set()
        with os.fdopen(reader, encoding="ascii") as lines:
            for line in lines:
                (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
        for group in groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
    finally:
        os._exit(0)
