"""What the server, the process that talks to Ray, and the actors on the nodes tell each other: picklable values.

All three run the same version of Rankwise; an actor of another version refuses to work (`workers.ray_actor`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from workers.attempt import AttemptSpec, Outcome

Verb = Literal["submit", "terminate", "kill", "discard"]


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A living node: its id, its name on the network, and the resources that it has in all."""

    id: str
    address: str
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Seat:
    """A slot's place in the cluster.

    Attributes:
        resources: what Ray reserves for one slot, as {"GPU": 1.0}.
        threads: for the numeric libraries: the node's cores, shared out among its slots.
    """

    slot: str
    node: str
    resources: Mapping[str, float]
    threads: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How an actor runs its worker processes.

    Attributes:
        version: of Rankwise, that the node must have too.
        resources: of one slot.
        devices: number of slots that each worker process has.
        threads: for the numeric libraries of each worker process.
        work_dir: folder on the node for scratch, cache and logs; None: a per-user one for temporary files.
        preload: modules that the fork server imports before it forks.
        environment: variables that worker processes get: credentials of the blob store. Never shown nor logged.
    """

    version: str
    resources: Mapping[str, float]
    devices: int
    threads: int
    work_dir: str | None
    preload: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker process as its actor last saw it.

    Attributes:
        attempts: how many it was given so far; `outcome` is of the last one of these.
        log_tail: of the newest attempt, once it or the process has ended.
        ended: {code, signal, peak_memory} of a process that has been reaped, and "lost" when nobody can know.
    """

    pid: int | None = None
    ready: bool = False
    attempts: int = 0
    outcome: Outcome | None = None
    log_tail: tuple[str, ...] = ()
    ended: Mapping[str, Any] | None = None


# From the server to the process that talks to Ray.


@dataclass(frozen=True, slots=True)
class Connect:
    """The first message: which cluster, and what all actors have in common."""

    address: str
    plan: Plan


@dataclass(frozen=True, slots=True)
class Start:
    """Start a worker, known as `worker` from here on, that has these seats, which are all on one node."""

    worker: int
    seats: tuple[Seat, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """Tell a worker to do something. Orders for one worker arrive in the order in which they were given."""

    worker: int
    verb: Verb
    spec: AttemptSpec | None = None


@dataclass(frozen=True, slots=True)
class Close:
    """End every worker, actor and the connection."""


# And back.


@dataclass(frozen=True, slots=True)
class Connected:
    """The cluster answers."""

    address: str


@dataclass(frozen=True, slots=True)
class Unreachable:
    """The cluster could not be reached; the process that says so ends."""

    detail: str
    hint: str


@dataclass(frozen=True, slots=True)
class Nodes:
    """The living nodes, whenever they are others than before."""

    nodes: tuple[ClusterNode, ...]


@dataclass(frozen=True, slots=True)
class Changed:
    """The newest state of a worker."""

    worker: int
    state: WorkerState


@dataclass(frozen=True, slots=True)
class Notice:
    """Something for the server's log."""

    event: str
    level: Literal["info", "warning", "error"]
    fields: Mapping[str, Any]
