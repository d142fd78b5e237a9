"""The actor that runs worker processes on a node of a Ray cluster, with the same code as on a single machine.

It holds the resources of its slots in Ray. The process of the actor is to its worker processes what a server is to
local ones (`workers.local`): it starts a fork server, which ends with it and takes all workers along, however the
actor came to its end. This module does not import Ray; `workers.ray_driver` makes an actor of the class.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import getpass
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from workers.attempt import AttemptSpec
from workers.devices import device_in_worker
from workers.local import LocalProvider, LocalWorker
from workers.provider import Slot, WorkerStartError
from workers.ray_messages import Order, Plan, WorkerState

WATCH_SECONDS = 30.0
CACHE_FOLDER = Path("cache") / "blobs"
_LOCK_NAME = "lock"


class SlotHost:
    """Runs one worker process at a time. Its methods are called through Ray, and all in one event loop.

    Each worker has a number that the caller gives; what concerns an earlier one than the newest does nothing.
    """

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._provider: LocalProvider | None = None
        self._folder: NodeFolder | None = None
        self._watched: WatchedWorker | None = None

    async def open(self, plan: Plan) -> str | None:
        """Get ready. Returns why this node can not serve, or None.

        Called again with the same plan it does nothing.
        """
        if self._provider is not None:
            return None
        here = version("rankwise")
        if here != plan.version:
            return f"the node has rankwise {here} and the server {plan.version}; run the same image everywhere"
        try:
            self._folder = NodeFolder(plan.work_dir)
        except OSError as error:
            return f"the node's work folder can not be used: {error}"
        os.environ.update(plan.environment)
        self._plan = plan
        self._provider = LocalProvider(local_slots(plan), preload=plan.preload, threads=plan.threads)
        return None

    async def begin(self, number: int) -> str | None:
        """Start worker `number`. Returns why it can not be started, or None."""
        assert self._provider is not None
        if self._watched is not None and self._watched.number >= number:
            return None  # asked for again, because the first answer was lost
        if self._watched is not None and self._watched.worker.alive():
            return f"worker {self._watched.number} still runs"
        watched = WatchedWorker(number, asyncio.get_running_loop())
        try:
            watched.worker = self._provider.start(self._provider.slots(), watched.notify)
        except WorkerStartError as error:
            return str(error)
        self._watched = watched
        return None

    async def order(self, number: int, first: int, orders: Sequence[Order]) -> None:
        """Carry out orders for worker `number`, of which `orders[0]` is the `first`-th: none is done twice."""
        watched = self._watched
        if watched is None or watched.number != number:
            return
        assert self._folder is not None
        assert self._plan is not None
        for position, order in enumerate(orders, start=first):
            if position == watched.orders_done:
                watched.carry_out(order, self._folder, self._plan)

    async def watch(self, number: int, seen: int) -> tuple[int, WorkerState]:
        """The state of worker `number` and its version, once that is newer than `seen`; else after a while as it is."""
        watched = self._watched
        if watched is None or watched.number != number:
            return seen, WorkerState(ended={"code": None, "signal": None, "peak_memory": None})
        return await watched.newer_than(seen)

    async def close(self) -> None:
        """End the worker, put its logs away and remove the folder of this actor."""
        if self._provider is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._provider.close)
        if self._folder is not None:
            self._folder.remove()


class WatchedWorker:
    """A worker process, and who wants to know when it changes."""

    worker: LocalWorker

    def __init__(self, number: int, loop: asyncio.AbstractEventLoop) -> None:
        self.number = number
        self.orders_done = 0
        self._loop = loop
        self._attempts = 0
        self._version = 0
        self._state = WorkerState()
        self._rung = asyncio.Event()

    def notify(self) -> None:
        """Called by the provider's thread."""
        with contextlib.suppress(RuntimeError):  # the actor ends, and its loop is closed
            self._loop.call_soon_threadsafe(self._rung.set)

    def carry_out(self, order: Order, folder: NodeFolder, plan: Plan) -> None:
        self.orders_done += 1
        match order.verb:
            case "submit":
                assert order.spec is not None
                self.worker.submit(folder.here(order.spec, plan))
                self._attempts += 1
            case "terminate":
                self.worker.terminate()
            case "kill":
                self.worker.kill()
            case "discard":
                self.worker.discard()

    async def newer_than(self, seen: int) -> tuple[int, WorkerState]:
        deadline = self._loop.time() + WATCH_SECONDS
        while True:
            self._rung.clear()
            self._look()
            left = deadline - self._loop.time()
            if self._version > seen or left <= 0:
                return self._version, self._state
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._rung.wait(), left)

    def _look(self) -> None:
        worker = self.worker
        ended = None if worker.alive() else worker.exit()
        outcome = worker.poll() if self._attempts else None
        state = WorkerState(
            pid=worker.pid,
            ready=worker.ready,
            attempts=self._attempts,
            outcome=outcome,
            ended=ended,
        )
        if state == replace(self._state, log_tail=()):
            return
        if outcome is not None or ended is not None:
            # Once it is put away there is none: what was told before stays.
            tail = tuple(worker.log_tail())
            kept = self._state.log_tail if self._state.attempts == self._attempts else ()
            state = replace(state, log_tail=tail or kept)
        self._state = state
        self._version += 1


class NodeFolder:
    """The folder on a node that one actor works in, beside those of others and a cache that all of them share.

    The actor holds a lock in its folder, which the kernel frees when its process ends: one that can be locked is left
    over, and removed.

    Raises:
        OSError: it can not be made, or others than this user may write to it.
    """

    def __init__(self, work_dir: str | None) -> None:
        self.root = Path(work_dir) if work_dir else Path(tempfile.gettempdir()) / f"rankwise-{getpass.getuser()}"
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self.root.stat()
        if work_dir is None and (status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022):
            raise PermissionError(f"{self.root} belongs to another user or can be written by one; set ray_work_dir")
        with (self.root / "folders-lock").open("a", encoding="ascii") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)  # nobody takes a folder that is being made for one that is left over
            self._remove_left_over()
            self.path = Path(tempfile.mkdtemp(prefix="actor-", dir=self.root))
            self._lock = (self.path / _LOCK_NAME).open("a", encoding="ascii")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _remove_left_over(self) -> None:
        for folder in self.root.glob("actor-*"):
            with contextlib.suppress(FileNotFoundError), (folder / _LOCK_NAME).open("a", encoding="ascii") as lock:
                if _try_lock(lock):
                    shutil.rmtree(folder, ignore_errors=True)

    def here(self, spec: AttemptSpec, plan: Plan) -> AttemptSpec:
        """The attempt with the folders and the device of this node in place of the server's."""
        name = f"{spec.job_id}-{spec.attempt}"
        return replace(
            spec,
            device=device_in_worker(local_slots(plan)[0]),
            scratch=str(self.path / name),
            cache=str(self.root / CACHE_FOLDER),
            log=str(self.path / "logs" / f"{name}.log") if spec.log else "",
        )

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def local_slots(plan: Plan) -> tuple[Slot, ...]:
    """The actor's slots as they are counted on its node, where Ray has made only its own GPUs visible."""
    share = gpus(plan.resources)
    if share == 0:
        return tuple(Slot(f"cpu:{index}", "cpu") for index in range(plan.devices))
    # Slots of half a GPU each sit two on one device.
    return tuple(Slot(f"gpu:{index}", f"cuda:{int(index * share)}") for index in range(plan.devices))


def gpus(resources: Mapping[str, Any]) -> float:
    """GPUs of one slot."""
    return float(resources.get("GPU", 0))
