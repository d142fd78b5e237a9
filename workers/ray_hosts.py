"""An actor on a node, and a worker process behind it, as the process that talks to Ray sees them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.ray_actor import SlotHost
from workers.ray_messages import Notice, Order, Plan, Seat, Start

CLOSE_SECONDS = 10.0
UNAVAILABLE_SECONDS = 20.0  # Ray itself holds a node for lost after about as long
# Ray kills the children of an actor's process with it. The fork server must be left to end the process groups of its
# workers, which it does as soon as the actor is gone.
ACTOR_ENVIRONMENT = {"RAY_kill_child_processes_on_worker_exit": "false"}
# What going on with another actor can help against; anything else is a bug, and ends the process.
LOST = (RayError, ConnectionError, TimeoutError)


class HostActor:
    """An actor on a node, from its creation until it is dropped."""

    def __init__(self, seats: tuple[Seat, ...], plan: Plan, tell: Callable[[Notice], None]) -> None:
        self.seats = seats
        self._tell = tell
        self.plan = replace(plan, resources=seats[0].resources, devices=len(seats), threads=seats[0].threads)
        self.worker: int | None = None
        self.opened = False
        self.gone = False
        wanted = {name: round(amount * len(seats), 4) for name, amount in seats[0].resources.items()}
        self._actor: Any = (
            ray.remote(SlotHost)
            .options(
                num_cpus=wanted.pop("CPU", 0),
                num_gpus=wanted.pop("GPU", 0),
                memory=wanted.pop("memory", None),
                resources=wanted or None,
                max_restarts=0,
                max_concurrency=100,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=seats[0].node, soft=False),
                runtime_env={"env_vars": ACTOR_ENVIRONMENT},
            )
            .remote()
        )

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(seat.slot for seat in self.seats)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method that may be called twice; waits while the actor can not be reached but may still live.

        Raises:
            RayError, ConnectionError, TimeoutError: the actor or the cluster is lost.
        """
        give_up_at = time.monotonic() + UNAVAILABLE_SECONDS
        while True:
            try:
                return await getattr(self._actor, method).remote(*arguments)
            except ActorUnavailableError:
                if self.gone or time.monotonic() > give_up_at:
                    raise
                await asyncio.sleep(1.0)

    async def close(self) -> None:
        """Let it put away what it holds, then drop it."""
        if self.opened and not self.gone:
            try:
                await asyncio.wait_for(self.call("close"), CLOSE_SECONDS)
            except LOST as error:
                self._tell(Notice("ray_actor_not_closed", "warning", {"slots": list(self.slots), "error": str(error)}))
        self.drop()

    def drop(self) -> None:
        """Kill the actor's process; its fork server then ends the workers. Ray frees the resources after that."""
        if not self.gone:
            self.gone = True
            try:
                ray.kill(self._actor)
            except LOST as error:
                self._tell(Notice("ray_actor_not_killed", "warning", {"slots": list(self.slots), "error": str(error)}))


class DrivenWorker:
    """A worker process behind its actor, driven by the server's orders."""

    def __init__(self, start: Start) -> None:
        self.number = start.worker
        self.seats = start.seats
        self.host: HostActor | None = None
        self.ended = False
        self.killed = False
        self.passing: asyncio.Task[None] | None = None
        self._orders: asyncio.Queue[Order] = asyncio.Queue()
        self._deaf = False

    def add(self, order: Order) -> None:
        self.killed = self.killed or order.verb == "kill"
        if not self._deaf:
            self._orders.put_nowait(order)

    async def pass_orders(self) -> None:
        """One call at a time, so that orders arrive as they were given; also after the worker's end, for its log."""
        assert self.host is not None
        sent = 0
        while not self._deaf:
            batch = [await self._orders.get()]
            while not self._orders.empty():
                batch.append(self._orders.get_nowait())
            try:
                await self.host.call("order", self.number, sent, tuple(batch))
            except LOST:
                self.close_orders()  # whoever watches the worker learns of the loss too, and tells
            sent += len(batch)
            for _ in batch:
                self._orders.task_done()

    async def drained(self) -> None:
        """Once all orders so far have been carried out."""
        await self._orders.join()

    def close_orders(self) -> None:
        """Nobody is left to carry out any."""
        self._deaf = True
        while not self._orders.empty():
            self._orders.get_nowait()
            self._orders.task_done()
