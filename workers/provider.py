"""The seam between the supervisor and what runs worker processes: slots, and two small protocols.

`workers.local` implements it on one machine. Another provider implements the same two protocols and nothing else:
the supervisor knows slots, outcomes and exits, and no process, socket or cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from workers.attempt import AttemptSpec, Outcome


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one device's work: an attempt runs on one slot, or on several of one host.

    Attributes:
        name: unique in its server, e.g. "cpu:0" or "cuda:1".
        device: "cpu", or "cuda:<index>" counted among the devices that this server sees.
    """

    name: str
    device: str


class Worker(Protocol):
    """One worker process, bound to its slots. No call blocks, and none raises because the process has died."""

    @property
    def pid(self) -> int | None:
        """Process id, None until the process exists."""

    @property
    def ready(self) -> bool:
        """Whether it has told that it takes attempts."""

    @property
    def host(self) -> str:
        """The machine that it runs on; "" until that is known."""

    @property
    def warm(self) -> tuple[str, ...]:
        """Ids of the base models that it holds in memory, as it told with its last outcome."""

    def submit(self, spec: AttemptSpec) -> None:
        """Start an attempt. The worker must be ready and without one."""

    def poll(self) -> Outcome | None:
        """The outcome of the attempt, once it has ended by itself."""

    def alive(self) -> bool:
        """False only after the process has been reaped: its memory and its device are free."""

    def exit(self) -> dict[str, Any]:
        """{code, signal, peak_memory}; code and signal are None while the process lives, peak_memory is in bytes."""

    def terminate(self) -> None:
        """Ask the attempt to stop at its next check (SIGTERM). A worker without one exits."""

    def kill(self) -> None:
        """End the whole process group (SIGKILL) and reap it; `alive` turns False afterwards."""

    def log_tail(self, lines: int = 200) -> list[str]:
        """The last lines that the newest attempt wrote."""

    def discard(self) -> None:
        """The end of the newest attempt has been written: its log goes where it is kept."""


class WorkerProvider(Protocol):
    """Starts worker processes."""

    def slots(self) -> tuple[Slot, ...]:
        """What it can serve now. In a cluster this changes as machines come and go."""

    def start(self, slots: Sequence[Slot], notify: Callable[[], None]) -> Worker:
        """Start one worker process that has the devices of all these slots, without waiting for it.

        Usually that is one slot; for a job that needs n devices it is n, and they end up on one host.

        `notify` is called, from any thread, whenever the worker became ready, has an outcome or has ended.

        Raises:
            WorkerStartError: none can be started now; try again later.
        """

    def close(self) -> None:
        """End every worker that is left, and the provider's own processes and threads."""


class WorkerStartError(Exception):
    """A worker process could not be started. Stays inside the pool: the supervisor tries again."""
