"""An attempt on several devices of one host: one process for each, as ranks of `torch.distributed`.

The worker process leads as rank 0 and forks the others into its own process group, so that whatever ends the group
ends them all. They meet over a file in the attempt's scratch folder: no port, so none can be taken. Every rank runs the
job's function; what rank 0 returns is published, once all the others have ended well.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import IO, NoReturn

import structlog

from workers import failures
from workers.attempt import AttemptSpec, Outcome
from workers.forkserver import RSS_UNIT, die_with_parent

RENDEZVOUS = "rendezvous"
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
LAST_RANK_SECONDS = 60.0  # how much longer than rank 0 another rank may take to end
FOLLOW_SECONDS = 15.0  # how long rank 0 may take to notice that another one has died

log = structlog.get_logger(__name__)


class RankFailedError(Exception):
    """Another rank failed: `outcome` is how."""

    def __init__(self, rank: int, outcome: Outcome) -> None:
        super().__init__(f"rank {rank}: {outcome.error['detail'] if outcome.error else outcome.state}")
        self.outcome = outcome


def is_follow_up(outcome: Outcome) -> bool:
    """Whether a rank failed only because another one had gone."""
    return (outcome.error or {}).get("code") == failures.PEER_LOST


@dataclass(slots=True)
class _Rank:
    """A forked rank. `failed_at` is of the monotonic clock, which all processes of the host share."""

    number: int
    pid: int
    pipe: IO[bytes]
    status: int | None = None
    outcome: Outcome | None = None
    failed_at: float | None = None
    peak_memory: int = 0
    ended: threading.Event = field(default_factory=threading.Event)


def device_of(device: str, rank: int) -> str:
    """What torch calls the device of a rank, when rank 0 has `device`."""
    return f"cuda:{rank}" if device.startswith("cuda") else device


def rank_spec(spec: AttemptSpec, rank: int) -> AttemptSpec:
    """The attempt as a rank sees it: its own device, and a scratch folder that no other rank writes to."""
    if rank == 0:
        return spec
    return replace(spec, device=device_of(spec.device, rank), scratch=str(Path(spec.scratch) / f"rank-{rank}"))


@contextmanager
def process_group(spec: AttemptSpec, rank: int) -> Iterator[None]:
    """`torch.distributed` for this rank of the attempt: nccl between CUDA devices, gloo on CPU."""
    import torch
    from torch import distributed

    cuda = spec.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device_of(spec.device, rank))
    with _environment(rank_environment(rank, spec.devices, torch.get_num_threads())):
        distributed.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=(Path(spec.scratch) / RENDEZVOUS).as_uri(),
            rank=rank,
            world_size=spec.devices,
            timeout=COLLECTIVE_TIMEOUT,
        )
        try:
            yield
        finally:
            distributed.destroy_process_group()


def rank_environment(rank: int, size: int, threads: int) -> dict[str, str]:
    """What torchrun tells a rank, and accelerate looks for; the address is never used, since the ranks have met."""
    found = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or threads,  # else accelerate would choose
    }
    if sys.platform == "linux":
        # The ranks share a host: loopback needs no name of the host to resolve.
        found["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return {name: str(value) for name, value in found.items()}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables; as they were before afterwards: a process may run attempts on one device later."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Ranks:
    """The ranks beside rank 0, as its process sees them.

    Args:
        run: what a forked rank does, as a function of its number; its outcome is sent to rank 0.
    """

    def __init__(self, spec: AttemptSpec, run: Callable[[int], Outcome]) -> None:
        self._ranks = [_fork(number, run) for number in range(1, spec.devices)]
        self._watchers = [
            threading.Thread(target=self._watch, args=(rank,), name=f"rank-{rank.number}", daemon=True)
            for rank in self._ranks
        ]
        self._over = threading.Event()
        for watcher in self._watchers:
            watcher.start()

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(rank.pid for rank in self._ranks)

    @property
    def peak_memory(self) -> int:
        """The sum of the largest resident sets of the ranks that have ended, bytes."""
        return sum(rank.peak_memory for rank in self._ranks)

    def interrupt(self) -> None:
        """Ask the other ranks to stop too."""
        for rank in self._ranks:
            if not rank.ended.is_set():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGTERM)

    def join(self) -> None:
        """Wait until the other ranks have ended.

        Raises:
            RankFailedError: one of them failed, or did not end in time.
        """
        deadline = time.monotonic() + LAST_RANK_SECONDS
        for rank in self._ranks:
            if not rank.ended.wait(max(0.0, deadline - time.monotonic())):
                raise RankFailedError(rank.number, _hung(rank.number))
        failed = [rank for rank in self._ranks if rank.failed_at is not None]
        if failed:
            first = self.cause() or failed[0].outcome
            assert first is not None
            raise RankFailedError(failed[0].number, first)

    def cause(self, wait: float = 0.0) -> Outcome | None:
        """How the first of them failed by itself, if one did; what its partners then failed with does not count.

        Args:
            wait: seconds to give them to end in.
        """
        deadline = time.monotonic() + wait
        for rank in self._ranks:
            rank.ended.wait(max(0.0, deadline - time.monotonic()))
        failed = [
            (rank.failed_at, rank.number, rank.outcome)
            for rank in self._ranks
            if rank.failed_at is not None and rank.outcome is not None and not is_follow_up(rank.outcome)
        ]
        return min(failed)[2] if failed else None

    def close(self) -> None:
        """End what is left of them and reap it."""
        self._over.set()
        for rank in self._ranks:
            if not rank.ended.is_set():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGKILL)
        for watcher in self._watchers:
            watcher.join()

    def _watch(self, rank: _Rank) -> None:
        with rank.pipe as pipe:
            data = pipe.read()
        moment = time.monotonic()
        _, rank.status, usage = os.wait4(rank.pid, 0)
        rank.peak_memory = usage.ru_maxrss * RSS_UNIT
        if data:
            rank.failed_at, rank.outcome = pickle.loads(data)  # noqa: S301 - from our own child
        else:
            code = os.waitstatus_to_exitcode(rank.status)
            ended = {"code": code if code >= 0 else None, "signal": -code if code < 0 else None, "peak_memory": None}
            rank.failed_at, rank.outcome = moment, Outcome("failed", failures.crashed(ended), "infrastructure")
        rank.ended.set()
        if rank.failed_at is not None and not self._over.wait(FOLLOW_SECONDS):
            # Rank 0 hangs in a collective operation that can never end. The supervisor sees the group die.
            log.error("rank_lost", rank=rank.number, detail=str(rank.outcome))
            os.killpg(0, signal.SIGKILL)


def _fork(number: int, run: Callable[[int], Outcome]) -> _Rank:
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _become_rank(number, run, parent, writer)
    os.close(writer)
    return _Rank(number, pid, os.fdopen(reader, "rb"))


def _become_rank(number: int, run: Callable[[int], Outcome], parent: int, writer: int) -> NoReturn:
    status = 1
    try:
        die_with_parent(parent)
        outcome = run(number)
        failed_at = None if outcome.state == "succeeded" else time.monotonic()
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(pickle.dumps((failed_at, outcome)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _hung(rank: int) -> Outcome:
    detail = f"Rank {rank} had not ended {LAST_RANK_SECONDS:g} s after rank 0."
    return Outcome("failed", {"code": "internal_error", "detail": detail, "hint": None}, "never")
