# SPDX-License-Identifier: Apache-2.0
"""Decides whose turn it is on the device, and puts servers to sleep and wakes them accordingly.

A single task, ``Schedule.run``, does this, so operations never overlap. A server goes to sleep only
after its requests have finished, and another one wakes only after that.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from vllm_sleep_ascend.client.calls import CallFailed
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import Turns

logger = logging.getLogger(__name__)


class Schedule:
    """Serves the requests that wait in ``turns``, by its settings."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.servers = turns.servers
        self.settings = turns.settings
        self.operations = turns.operations

    async def run(self) -> None:
        """Sleep and wake servers for as long as the proxy lives."""
        step: Callable[[], Awaitable[float | None]] = self._survey
        while True:
            self.turns.changed.clear()
            try:
                pause = await step()
                step = self._step
            except Exception as error:  # After any error, so that requests do not wait for ever.
                logger.exception("a switch failed")
                for server in self.servers:
                    server.fail(CallFailed(f"the switch failed: {error!r}"))
                pause = 1.0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.turns.changed.wait(), pause)

    async def _survey(self) -> float:
        """Query the servers' models and states, and put all but ``max_awake`` to sleep."""
        await self.operations.learn_models(self.servers)
        errors = await asyncio.gather(*(self.operations.ask(server) for server in self.servers))
        awake = [server for server in self.servers if server.state == "awake"]
        for server, error in zip(self.servers, errors, strict=True):
            if error is None and server not in awake[: self.settings.max_awake]:
                await self.operations.sleep(server)
        return 0

    async def _step(self) -> float | None:
        """Do what is possible now. Returns the seconds after which there may be more to do."""
        await self._sleep_those_asked()
        pauses = [await self._sleep_idle()]
        wanted = min(
            (s for s in self.servers if s.waiting and s.state != "awake"),
            key=Server.waits_since,
            default=None,
        )
        leaving = None
        if wanted is not None:
            awake = [server for server in self.servers if server.state == "awake"]
            if len(awake) < self.settings.max_awake:
                await self._wake(wanted)
                return 0
            leaving = min(awake, key=_leaves_first)
            rest = leaving.awake_since + self.settings.turn_s - time.monotonic()
            if leaving.busy and (rest > 0 or not leaving.served):
                pauses.append(rest if rest > 0 else None)
                leaving = None  # Its turn continues.
            elif await self._makes_way(leaving, wanted):
                return 0
        for server in self.servers:
            if server.state != "awake" or server is leaving or server.sleep_asked is not None:
                continue
            if server.waiting and server.unsure:
                await self.operations.ask(server)
                if server.state != "awake":
                    return 0
            server.open_up()
        return min((pause for pause in pauses if pause is not None), default=None)

    async def _makes_way(self, leaving: Server, wanted: Server) -> bool:
        """Close ``leaving``, and put it to sleep unless requests still run on it. Returns whether
        anything was decided."""
        # No server is put to sleep for an unreachable one.
        if leaving.open and (error := await self.operations.ask(wanted)) is not None:
            wanted.fail(error)
            return True
        leaving.open = False
        if leaving.in_flight:
            return False
        if not await self.operations.sleep(leaving):
            wanted.fail(CallFailed(f"{leaving.name} does not fall asleep"))
        return True

    async def _wake(self, server: Server) -> None:
        """Wake it, after putting all others to sleep that may be awake because something else has
        woken or restarted them."""
        if server.state == "unknown" and (error := await self.operations.ask(server)) is not None:
            server.fail(error)
            return
        others = [s for s in self.servers if s is not server and s.state != "awake"]
        sleeping = [other for other in others if other.state == "asleep"]
        await asyncio.gather(*(self.operations.ask(other) for other in sleeping))
        # A server that has never listed its models does not count: it is not up yet, or not vLLM.
        await self.operations.learn_models([other for other in others if not other.models])
        for other in others:
            known = other.models and other.state != "asleep"
            if known and not await self.operations.sleep(other):
                server.fail(CallFailed(f"{other.name} may be awake and does not fall asleep"))
                return
        await self.operations.wake(server)

    async def _sleep_those_asked(self) -> None:
        for server in self.servers:
            asked = server.sleep_asked
            if asked is None or server.in_flight:
                continue
            slept = server.state == "asleep" or await self.operations.sleep(server)
            server.sleep_asked = None
            if slept:
                asked.set_result(None)
            else:
                asked.set_exception(CallFailed(f"{server.name} did not fall asleep; see the log"))

    async def _sleep_idle(self) -> float | None:
        """Put servers to sleep that are idle long enough. Returns the seconds until the next."""
        pauses, idle_s = [], self.settings.idle_s
        for server in self.servers:
            if not idle_s or server.state != "awake" or server.busy:
                continue
            rest = max(server.last_used, server.awake_since) + idle_s - time.monotonic()
            if rest > 0:
                pauses.append(rest)
            elif not await self.operations.sleep(server):
                pauses.append(idle_s)
        return min(pauses, default=None)


def _leaves_first(server: Server) -> tuple[bool, float]:
    """The least recently used idle server, otherwise the busy one with the longest turn."""
    return (server.busy, server.awake_since if server.busy else server.last_used)
