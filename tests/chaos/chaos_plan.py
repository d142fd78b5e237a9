"""What a round will do: its jobs and the adversary's acts, all decided by the seed before the round begins."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass, field
from typing import Any

SERVERS = ("api", "one", "two")  # the first serves HTTP as well
SLOTS = 2  # of each server
EVENTS = 8


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """A job to submit `at` seconds into the round, and to cancel at `cancel_at` if that is not None."""

    number: int
    kind: str
    params: dict[str, Any]
    at: float
    cancel_at: float | None = None
    resources: dict[str, Any] = field(default_factory=dict)
    priority: int = 0
    over_http: bool = False


@dataclass(frozen=True, slots=True)
class Act:
    """Something that the adversary does `at` seconds into the round.

    Attributes:
        pick: which one of what is there at that moment, as a fraction of them.
        amount: seconds that it lasts, or that the clock jumps.
    """

    at: float
    name: str
    target: str = ""
    pick: float = 0.0
    amount: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    seconds: float
    jobs: tuple[PlannedJob, ...]
    acts: tuple[Act, ...]
    gates: tuple[float, ...]  # when each gate opens
    events: tuple[float, ...]  # when something happens that a schedule waits for
    restart_after: dict[str, tuple[float, ...]]  # how long each server stays down, turn by turn


# kind → how many of a hundred jobs
_MIX = {
    "quiet": 14,
    "chatty": 8,
    "steps": 18,
    "slow": 12,
    "gated": 2,
    "crash_once": 6,
    "crash_always": 1,
    "infrastructure_once": 4,
    "device_memory": 5,
    "user_error": 5,
    "stubborn": 5,
    "all_reduce": 5,
    "merge": 20,
}
_CANCELLED = 0.2  # of all jobs, at a random moment


def make_plan(seed: int, *, jobs: int, seconds: float, lease: float, restartable: bool) -> Plan:
    """The round of this seed.

    Args:
        restartable: whether the database is a server with processes of its own.
    """
    generator = random.Random(seed)
    gates = tuple(generator.uniform(0.2, 0.9) * seconds for _ in range(2))
    # Not at the beginning: a clock that is set back could put them before the schedule was made.
    events = tuple(sorted(generator.uniform(0.3, 0.9) * seconds for _ in range(EVENTS)))
    kinds = _kinds(generator, jobs)
    planned = tuple(_job(generator, number, kind, seconds, len(gates)) for number, kind in enumerate(kinds))
    acts = sorted(_acts(generator, seconds, lease, restartable), key=lambda act: act.at)
    downs = {name: tuple(generator.uniform(0.1, 1.5) for _ in range(8)) for name in SERVERS}
    return Plan(seed, seconds, planned, tuple(acts), gates, events, downs)


def canaries() -> tuple[PlannedJob, ...]:
    """One job of each kind for when the adversary has gone: each must end as if nothing had ever happened."""
    generator = random.Random(0)
    kinds = [kind for kind in _MIX if kind != "gated"]
    return tuple(_job(generator, 10_000 + number, kind, 0.0, 0, calm=True) for number, kind in enumerate(kinds))


def _kinds(generator: random.Random, jobs: int) -> list[str]:
    """The mix in its shares, every kind at least once, in random order."""
    total = sum(_MIX.values())
    kinds = [kind for kind, share in _MIX.items() for _ in range(max(1, share * jobs // total))]
    kinds += ["quiet"] * (jobs - len(kinds))
    generator.shuffle(kinds)
    return kinds


def _job(
    generator: random.Random, number: int, kind: str, seconds: float, gates: int, *, calm: bool = False
) -> PlannedJob:
    at = 0.0 if generator.random() < 0.3 else generator.uniform(0.0, 0.9 * seconds)
    cancelled = generator.random() < _CANCELLED
    cancel_after = generator.choice((0.0, generator.uniform(0.0, 2.0), generator.uniform(0.0, 6.0)))
    return PlannedJob(
        number=number,
        kind=kind,
        params=_params(generator, kind, number, gates, calm=calm),
        at=at,
        cancel_at=at + cancel_after if cancelled and not calm else None,
        resources={"devices": 2} if kind == "all_reduce" else {},
        priority=generator.choice((0, 0, 0, 5, -5)),
        over_http=kind == "merge",
    )


def _params(generator: random.Random, kind: str, number: int, gates: int, *, calm: bool) -> dict[str, Any]:
    match kind:
        case "chatty":
            return {"lines": generator.choice((1, 30, 500))}
        case "steps":
            return {"steps": generator.randint(2, 8) if calm else generator.choice((5, 10, 15, 60))}
        case "slow":
            return {"seconds": 0.5 if calm else generator.choice((0.2, 1.0, 2.0, 7.0))}
        case "stubborn":
            return {"seconds": round(generator.uniform(0.2, 2.0), 3)}
        case "all_reduce":
            return {"turns": generator.randint(1, 10)}
        case "gated":
            return {"gate": generator.randrange(gates)}  # the round puts its path here
        case "crash_once":
            return {"signal": int(generator.choice((signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGABRT)))}
        case "device_memory":
            return {"always": generator.random() < 0.3}
        case "merge":
            # Weights of its own, and fewer ranks than its inputs have: no two jobs make the same adapter.
            method, parameters = generator.choice((("cat", {}), ("svd", {"rank": 4}), ("lego", {"rank": 4})))
            return {"method": method, "parameters": parameters, "weight": 1.0 + number / 1024}
        case _:
            return {}


def _acts(generator: random.Random, seconds: float, lease: float, restartable: bool) -> list[Act]:
    def moment() -> float:
        return generator.uniform(0.08, 1.0) * seconds

    def worker() -> str:
        return generator.choice(SERVERS)

    acts = [Act(moment(), "kill worker", worker(), generator.random()) for _ in range(14)]
    acts += [Act(moment(), "kill fork server", worker(), generator.random()) for _ in range(2)]
    acts += [Act(moment(), "kill server", generator.choice(SERVERS[1:])) for _ in range(3)]
    acts += [Act(moment(), "kill server", SERVERS[0]) for _ in range(2)]
    # Long enough for another server to take over what the frozen one's workers go on with.
    acts += [Act(moment(), "freeze", worker(), amount=lease * generator.uniform(2.0, 3.5)) for _ in range(4)]
    acts += [Act(moment(), "fill the disk", amount=generator.uniform(0.3, 1.5)) for _ in range(2)]
    acts += [
        Act(moment(), "jump", amount=lease * generator.uniform(1.1, 3.0)),
        Act(moment(), "jump", amount=-lease * generator.uniform(0.5, 1.5)),
    ]
    if restartable:
        acts += [Act(moment(), "restart the database") for _ in range(2)]
        acts += [Act(moment(), "kill a database process", pick=generator.random()) for _ in range(2)]
    return acts
