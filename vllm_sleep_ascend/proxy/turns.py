# SPDX-License-Identifier: Apache-2.0
"""Requests wait here until it is their server's turn on the device."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from vllm_sleep_ascend.client.calls import CallFailed
from vllm_sleep_ascend.proxy.figures import Memory
from vllm_sleep_ascend.proxy.metrics import Metrics
from vllm_sleep_ascend.proxy.operations import Operations
from vllm_sleep_ascend.proxy.servers import Server


class QueueFull(Exception):
    """Too many requests are waiting. ``retry_after_s`` says when to retry."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many requests wait; come again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Settings:
    """
    max_queue: the most requests that may wait, for all servers together.
    turn_s: seconds that a server keeps its turn while requests wait for another one.
    idle_s: seconds without a request after which a server is put to sleep; 0 for never.
    max_awake: how many servers may be awake on a device; None: as many as fit by bytes.
    link_gb_s: how fast a device's link is, for the page; None: not known.
    """

    max_queue: int = 256
    turn_s: float = 2.0
    idle_s: float = 0.0
    max_awake: int | None = 1
    link_gb_s: float | None = None


class Turns:
    """The servers, and the requests for them. ``changed`` tells the schedule that there may be
    something to do."""

    def __init__(self, servers: list[Server], metrics: Metrics, settings: Settings) -> None:
        self.servers = servers
        self.metrics = metrics
        self.settings = settings
        self.operations = Operations(metrics)
        self.memory = Memory(servers)
        self.changed = asyncio.Event()
        self._models_asked = -math.inf
        self._asking: asyncio.Task[None] | None = None
        for server in servers:
            metrics.watch(server)

    def add(self, server: Server) -> None:
        self.servers.append(server)
        self.metrics.watch(server)
        self.changed.set()

    def remove(self, server: Server) -> None:
        """It has nothing left to do."""
        self.servers.remove(server)
        for asked in (server.sleep_asked, server.stop_asked):
            if asked is not None and not asked.done():
                asked.set_result(None)
        after = next((other for other in self.servers if other.name == server.name), None)
        if after is None:
            self.metrics.forget(server.name)
        else:
            self.metrics.watch(after)
        self.changed.set()

    @property
    def current(self) -> list[Server]:
        """Those that get new requests."""
        return [server for server in self.servers if not server.retiring]

    async def server_of(self, model: str) -> Server | None:
        """The server of this model; None if there is none."""
        if (server := self._known(model)) is not None:
            return server
        # A server that was not up before may be now. Other requests wait for the same answer.
        if time.monotonic() - self._models_asked > 1:
            self._models_asked = time.monotonic()
            self._asking = asyncio.create_task(self.operations.learn_models(self.servers))
        if self._asking is not None:
            await asyncio.shield(self._asking)
        return self._known(model)

    def _known(self, model: str) -> Server | None:
        named = (server for server in self.current if model in server.names)
        listed = (server for server in self.current if model in server.models)
        return next(named, None) or next(listed, None)

    @contextlib.asynccontextmanager
    async def turn(self, server: Server) -> AsyncIterator[None]:
        """Wait until the server is awake, and keep it awake inside.

        Raises:
            QueueFull: too many are waiting.
            CallFailed: the server could not be woken.
        """
        await self.enter(server)
        try:
            yield
        finally:
            self.leave(server)

    async def enter(self, server: Server) -> None:
        """The first half of ``turn``; ``leave`` is the second."""
        started = time.monotonic()
        if server not in self.servers:  # by a reload, since it was chosen
            raise CallFailed(f"{server.name} was removed")
        if server.open and not server.unsure:
            server.enter()
        elif sum(len(each.waiting) for each in self.servers) >= self.settings.max_queue:
            raise QueueFull(max(1, math.ceil(self.settings.turn_s + self.operations.last_wake_s)))
        else:
            self.changed.set()
            await server.wait()
        self.metrics.wait.observe(time.monotonic() - started)

    def leave(self, server: Server, broken: bool = False) -> None:
        """A request has ended; ``broken``: its server did not answer properly."""
        server.leave()
        if broken and server.state == "awake":
            server.state, server.open = "unknown", False
        self.changed.set()

    async def put_to_sleep(self, server: Server) -> None:
        """Let running requests finish, then sleep.

        Raises:
            CallFailed: it did not fall asleep.
        """
        if server.sleep_asked is None:
            server.sleep_asked = asyncio.get_running_loop().create_future()
        server.open = False
        self.changed.set()
        await asyncio.shield(server.sleep_asked)

    async def stop(self, server: Server) -> None:
        """Let running requests finish, then end its process, which the proxy has started. Another
        request starts it again.

        Raises:
            CallFailed: it does not end.
        """
        if server.stop_asked is None:
            server.stop_asked = asyncio.get_running_loop().create_future()
        server.open = False
        self.changed.set()
        await asyncio.shield(server.stop_asked)
