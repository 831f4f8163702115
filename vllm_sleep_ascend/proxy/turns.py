# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is on the device: requests wait here until their server is awake.

One task, ``run``, does all sleeping and waking, so that no two of them overlap. A server falls
asleep only when nothing runs on it any more, and another wakes only when it has fallen asleep.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from vllm_sleep_ascend.client import CallFailed, NobodyListens, SleepClient
from vllm_sleep_ascend.proxy.metrics import Metrics

logger = logging.getLogger(__name__)

State = Literal["awake", "asleep", "unknown"]


class QueueFull(Exception):
    """Too many requests wait already. ``retry_after_s`` says when to come again."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many requests wait; come again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class Server:
    """One vLLM server. ``state`` is unknown until it told, and after a failure."""

    client: SleepClient
    models: list[str] = field(default_factory=list)
    state: State = "unknown"
    # Requests that wait for it, by number, with the time of their arrival.
    waiting: "OrderedDict[int, tuple[float, asyncio.Future]]" = field(default_factory=OrderedDict)
    in_flight: int = 0
    awake_since: float = 0.0
    # Whether a request was admitted since it woke: each turn serves at least one.
    served: bool = False
    last_used: float = 0.0
    # Somebody asked for it to sleep; answered when it does.
    sleep_asked: "asyncio.Future | None" = None

    @property
    def name(self) -> str:
        return self.client.url

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or self.in_flight > 0

    def waits_since(self) -> float:
        return next(iter(self.waiting.values()))[0] if self.waiting else math.inf


class Turns:
    """The servers of one device, and the requests for them.

    Args:
        level: of sleep.
        max_queue: requests that may wait, for all servers together.
        turn_s: seconds for which a server that has woken serves on while another is waited for.
        idle_s: seconds without a request after which a server falls asleep; 0: never.
        max_awake: servers that fit awake.
    """

    def __init__(
        self,
        servers: list[Server],
        metrics: Metrics,
        level: int = 1,
        max_queue: int = 256,
        turn_s: float = 2.0,
        idle_s: float = 0.0,
        max_awake: int = 1,
    ) -> None:
        self.servers = servers
        self.metrics = metrics
        self.level = level
        self.max_queue = max_queue
        self.turn_s = turn_s
        self.idle_s = idle_s
        self.max_awake = max_awake
        self._numbers = itertools.count()
        self._changed = asyncio.Event()
        self._last_switch_s = 1.0
        for server in servers:
            metrics.watch(server)

    @contextlib.asynccontextmanager
    async def turn(self, server: Server) -> AsyncIterator[None]:
        """Wait until the server is awake, and keep it awake inside.

        Raises:
            QueueFull: too many wait already.
            CallFailed: the server could not be woken.
        """
        await self.enter(server)
        try:
            yield
        finally:
            self.leave(server)

    async def enter(self, server: Server) -> None:
        """As ``turn``; whoever entered must ``leave``."""
        if sum(len(each.waiting) for each in self.servers) >= self.max_queue:
            raise QueueFull(max(1, math.ceil(self.turn_s + self._last_switch_s)))
        number, arrival = next(self._numbers), time.monotonic()
        admitted = asyncio.get_running_loop().create_future()
        server.waiting[number] = (arrival, admitted)
        self._changed.set()
        try:
            await admitted
        except BaseException:
            if server.waiting.pop(number, None) is None and _succeeded(admitted):
                self.leave(server)  # Admitted at the moment in which its client went away.
            raise
        self.metrics.wait.observe(time.monotonic() - arrival)

    def leave(self, server: Server) -> None:
        server.in_flight -= 1
        server.last_used = time.monotonic()
        self._changed.set()

    async def put_to_sleep(self, server: Server) -> None:
        """Let running requests finish, then sleep.

        Raises:
            CallFailed: it did not fall asleep.
        """
        if server.sleep_asked is None:
            server.sleep_asked = asyncio.get_running_loop().create_future()
        self._changed.set()
        await asyncio.shield(server.sleep_asked)

    async def run(self) -> None:
        """Sleep and wake servers for as long as the proxy lives."""
        await self.survey()
        while True:
            self._changed.clear()
            try:
                pause = await self._step()
            except Exception as error:  # Whatever a server answered: requests must not wait on.
                logger.exception("a switch failed")
                for server in self.servers:
                    self._fail(server, CallFailed(f"the switch failed: {error!r}"))
                pause = 1.0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), pause)

    async def survey(self) -> None:
        """Ask the servers who sleeps, and what they serve; see that not too many are awake."""
        await self.learn_models()
        for server in self.servers:
            with contextlib.suppress(CallFailed):
                server.state = "asleep" if await server.client.is_sleeping() else "awake"
        for server in [s for s in self.servers if s.state == "awake"][self.max_awake :]:
            await self._sleep(server)

    async def learn_models(self) -> None:
        """Ask what they serve those servers that have not told yet."""
        for server in self.servers:
            if not server.models:
                with contextlib.suppress(CallFailed):
                    server.models = (await server.client.status())["models"]

    async def _step(self) -> float | None:
        """Do what can be done now. Gives the seconds after which there may be more to do."""
        now = time.monotonic()
        await self._sleep_those_asked()
        pauses = [await self._sleep_idle(now)]
        wanted = min(
            (s for s in self.servers if s.waiting and s.state != "awake"),
            key=Server.waits_since,
            default=None,
        )
        leaving = None
        if wanted is not None:
            awake = [server for server in self.servers if server.state == "awake"]
            if len(awake) < self.max_awake:
                await self._wake(wanted)
                return 0
            leaving = min(awake, key=lambda s: (s.busy, s.last_used))
            rest = leaving.awake_since + self.turn_s - now
            over = rest <= 0 and leaving.served
            if not leaving.busy or (over and leaving.in_flight == 0):
                if not await self._sleep(leaving):
                    self._fail(wanted, CallFailed(f"{leaving.name} does not fall asleep"))
                return 0
            if not over:
                pauses.append(max(rest, 0) or None)
                leaving = None  # Its turn goes on.
        for server in self.servers:
            if server.state == "awake" and server is not leaving and server.sleep_asked is None:
                self._admit(server)
        return min((pause for pause in pauses if pause is not None), default=None)

    def _admit(self, server: Server) -> None:
        while server.waiting:
            _, (_, admitted) = server.waiting.popitem(last=False)
            if not admitted.done():
                server.in_flight += 1
                server.served = True
                server.last_used = time.monotonic()
                admitted.set_result(None)

    async def _sleep_those_asked(self) -> None:
        for server in self.servers:
            asked = server.sleep_asked
            if asked is None or server.in_flight:
                continue
            slept = server.state == "asleep" or await self._sleep(server)
            server.sleep_asked = None
            if slept:
                asked.set_result(None)
            else:
                asked.set_exception(CallFailed(f"{server.name} did not fall asleep; see the log"))

    async def _sleep_idle(self, now: float) -> float | None:
        pause = None
        for server in self.servers:
            if not self.idle_s or server.state != "awake" or server.busy:
                continue
            rest = max(server.last_used, server.awake_since) + self.idle_s - now
            if rest <= 0:
                await self._sleep(server)
                rest = self.idle_s if server.state == "awake" else math.inf
            if rest < math.inf:
                pause = min(rest, pause or math.inf)
        return pause

    async def _wake(self, server: Server) -> None:
        # What may be awake without our knowledge sleeps first.
        for other in self.servers:
            if other is not server and other.state == "unknown" and not await self._sleep(other):
                self._fail(server, CallFailed(f"{other.name} may be awake and does not answer"))
                return
        started = time.monotonic()
        try:
            await server.client.wake_to_serve(slept_at=self.level)
        except CallFailed as error:
            server.state = "unknown"
            self.metrics.failures.labels(server.name, "wake").inc()
            logger.warning("wake: %s", error)
            self._fail(server, error)
            return
        server.state, server.served = "awake", False
        server.awake_since = time.monotonic()
        self._last_switch_s = server.awake_since - started
        self.metrics.operation.labels("wake").observe(self._last_switch_s)
        self.metrics.switches.labels(server.name).inc()

    async def _sleep(self, server: Server) -> bool:
        """Whether it holds no device memory now: it sleeps, or is gone."""
        started = time.monotonic()
        try:
            await server.client.sleep(self.level, mode="wait")
        except NobodyListens as error:
            logger.warning("sleep: %s", error)  # The process is dead, and its memory free.
            server.state = "unknown"
            return True
        except CallFailed as error:
            logger.warning("sleep: %s", error)
            self.metrics.failures.labels(server.name, "sleep").inc()
            server.state = "unknown"
            return False
        server.state = "asleep"
        self.metrics.operation.labels("sleep").observe(time.monotonic() - started)
        self.metrics.sleeps.labels(server.name).inc()
        return True

    def _fail(self, server: Server, error: CallFailed) -> None:
        while server.waiting:
            _, (_, admitted) = server.waiting.popitem(last=False)
            if not admitted.done():
                admitted.set_exception(error)


def _succeeded(future: asyncio.Future) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
