"""The process that talks to Ray for one server: `python -m workers.ray_driver`, started by `workers.ray_provider`.

A process of its own, because a Ray driver ends its whole process when it has lost the cluster for a while, and
because Ray replaces signal handlers and changes the search path of the process that it is imported into. Its end,
however it came, ends its actors on all nodes, and with them the worker processes; the server then starts another one.

Protocol: pickled values of `workers.ray_messages`, over a UNIX stream socket. Its end ends this process.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Coroutine
from multiprocessing.connection import Connection
from typing import Any

import ray

from workers.ray_connection import connect, explain_loss, explain_refusal, first_line, living_nodes
from workers.ray_hosts import LOST, DrivenWorker, HostActor
from workers.ray_messages import (
    Changed,
    Close,
    ClusterNode,
    Connect,
    Connected,
    Nodes,
    Notice,
    Order,
    Plan,
    Start,
    WorkerState,
)

EXIT_UNREACHABLE = 3
EXIT_FAILED = 4
NODES_SECONDS = 1.0
KILL_SECONDS = 10.0
DRAIN_SECONDS = 10.0
PENDING_SECONDS = 30.0


class RayDriver:
    """Connects to the cluster, keeps its actors, and passes orders and news on."""

    def __init__(self, channel: Connection, plan: Plan) -> None:
        self._channel = channel
        self._plan = plan
        self._hosts: dict[tuple[str, ...], HostActor] = {}
        self._workers: dict[int, DrivenWorker] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    async def run(self) -> None:
        """Serve until the server is gone or says that it closes."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._channel.fileno(), self._receive)
        self._spawn(self._watch_nodes())
        await self._closing.wait()
        loop.remove_reader(self._channel.fileno())
        await asyncio.gather(*(self._close_host(host) for host in list(self._hosts.values())))

    def _receive(self) -> None:
        try:
            while self._channel.poll():
                self._take(self._channel.recv())
        except (EOFError, OSError):
            os._exit(0)  # the server is gone: so are the actors, once this process is

    def _take(self, message: Any) -> None:
        match message:
            case Start():
                worker = self._workers[message.worker] = DrivenWorker(message)
                self._spawn(self._serve(worker))
            case Order():
                worker_of_order = self._workers.get(message.worker)
                if worker_of_order is not None:
                    worker_of_order.add(message)
                    if message.verb == "kill":
                        self._spawn(self._enforce_kill(worker_of_order))
            case Close():
                self._closing.set()

    def _send(self, message: Any) -> None:
        try:
            self._channel.send(message)
        except OSError:
            os._exit(0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run it beside the rest. What it raises ends this process at once: the server then starts another."""

        async def guarded() -> None:
            try:
                await work
            except Exception:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(EXIT_FAILED)

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _watch_nodes(self) -> None:
        """Tell which nodes live, whenever that changes.

        Raises:
            ConnectionError: the node through which this process is connected is lost. Ray then starts no actors for
                it any more, and does not always say so.
        """
        own = ray.get_runtime_context().get_node_id()
        known: tuple[ClusterNode, ...] | None = None
        answers = True
        while not self._closing.is_set():
            try:
                nodes = await asyncio.get_running_loop().run_in_executor(None, living_nodes)
            except (*LOST, RuntimeError) as error:
                if answers:
                    self._send(Notice("ray_does_not_answer", "warning", {"error": first_line(error)}))
                answers = False
            else:
                answers = True
                if own not in {node.id for node in nodes}:
                    raise ConnectionError(f"the node {own}, through which this server is connected, is lost")
                if nodes != known:
                    known = nodes
                    self._send(Nodes(nodes))
            await asyncio.sleep(NODES_SECONDS)

    async def _serve(self, worker: DrivenWorker) -> None:
        """From the start of a worker to its end."""
        try:
            refusal = await self._begin(worker)
            if refusal is None:
                worker.passing = self._spawn(worker.pass_orders())
                await self._watch(worker)
            else:
                self._finish(worker, lost=refusal)
        except (*LOST, ValueError) as error:  # ValueError: Ray can not reserve such an amount
            if worker.host is not None:
                self._drop(worker.host)
            self._finish(worker, lost=explain_loss(error, worker.seats[0].node))

    async def _begin(self, worker: DrivenWorker) -> str | None:
        """Start it on its actor. Returns why that can not be done, or None."""
        host = worker.host = await self._host_for(worker)
        if worker.killed:
            return "it was killed before it had started"
        if not host.opened:
            self._spawn(self._tell_if_pending(host))
            refusal: str | None = await host.call("open", host.plan)
            if refusal is not None:
                self._drop(host)
                return refusal
            host.opened = True
        why: str | None = await host.call("begin", worker.number)
        return why

    async def _host_for(self, worker: DrivenWorker) -> HostActor:
        """The actor of exactly these slots: the one that is there, or a new one in place of those that hold them."""
        slots = tuple(seat.slot for seat in worker.seats)
        host = self._hosts.get(slots)
        if host is not None and not await self._forget(host.worker):
            self._drop(host)
        if host is None or host.gone:
            others = [other for other in self._hosts.values() if set(other.slots) & set(slots)]
            for other in others:
                self._hosts.pop(other.slots, None)
            host = self._hosts[slots] = HostActor(worker.seats, self._plan, self._send)
            # Its resources are free once these are gone; until then it waits.
            await asyncio.gather(*(self._close_host(other) for other in others))
        host.worker = worker.number
        return host

    async def _forget(self, number: int | None) -> bool:
        """Once its last orders are carried out, or not within a while: then the answer is False."""
        worker = self._workers.pop(number, None) if number is not None else None
        if worker is None:
            return True
        try:
            await asyncio.wait_for(worker.drained(), DRAIN_SECONDS)
        except TimeoutError:
            return False
        finally:
            worker.close_orders()
            if worker.passing is not None:
                worker.passing.cancel()
        return True

    async def _close_host(self, host: HostActor) -> None:
        await self._forget(host.worker)
        await host.close()

    async def _tell_if_pending(self, host: HostActor) -> None:
        await asyncio.sleep(PENDING_SECONDS)
        if not host.opened and not host.gone:
            wanted = {name: amount * len(host.seats) for name, amount in host.seats[0].resources.items()}
            self._send(
                Notice(
                    "ray_actor_waits",
                    "warning",
                    {"slots": list(host.slots), "node": host.seats[0].node, "resources": wanted},
                )
            )

    async def _watch(self, worker: DrivenWorker) -> None:
        assert worker.host is not None
        seen = 0
        while not worker.ended:
            newest, state = await worker.host.call("watch", worker.number, seen)
            if newest == seen and state.ended is None:
                continue
            seen = newest
            if state.ended is not None:
                self._finish(worker, state=state)
            else:
                self._send(Changed(worker.number, state))

    def _finish(self, worker: DrivenWorker, *, state: WorkerState | None = None, lost: str | None = None) -> None:
        worker.ended = True
        if state is None:
            worker.close_orders()
            self._workers.pop(worker.number, None)
            number = int(signal.SIGKILL) if worker.killed else None
            ended: dict[str, Any] = {"code": None, "signal": number, "peak_memory": None}
            state = WorkerState(ended=ended if worker.killed else {**ended, "lost": lost})
        self._send(Changed(worker.number, state))

    async def _enforce_kill(self, worker: DrivenWorker) -> None:
        """A kill that the actor does not confirm ends the actor."""
        if worker.host is not None and worker.host.opened:
            deadline = time.monotonic() + KILL_SECONDS
            while not worker.ended and time.monotonic() < deadline:
                await asyncio.sleep(0.1)
        if not worker.ended and worker.host is not None:
            self._drop(worker.host)

    def _drop(self, host: HostActor) -> None:
        self._hosts.pop(host.slots, None)
        host.drop()


def end_with(channel: Connection) -> None:
    """End this process as soon as the other end of the channel is closed, whatever it does then."""

    def wait() -> None:
        poller = select.poll()
        poller.register(channel.fileno(), select.POLLHUP | select.POLLRDHUP)
        poller.poll()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def own_output() -> str:
    """What this process has written so far, of which the server keeps a file; "" when it writes elsewhere."""
    sys.stderr.flush()
    if not stat.S_ISREG(os.fstat(2).st_mode):
        return ""
    return os.pread(2, 65536, 0).decode("utf-8", errors="replace")


def main(channel_fd: int) -> int:
    """Serve one server. Returns the exit code."""
    channel = Connection(channel_fd)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with(channel)
    request: Connect = channel.recv()
    try:
        connect(request.address)
    except (*LOST, OSError, RuntimeError, ValueError) as error:
        channel.send(explain_refusal(error, request.address, own_output()))
        return EXIT_UNREACHABLE
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray has set a handler; the server says when it is over
    channel.send(Connected(request.address))
    asyncio.run(RayDriver(channel, request.plan).run())
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
