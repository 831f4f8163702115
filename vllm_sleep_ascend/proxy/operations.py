# SPDX-License-Identifier: Apache-2.0
"""Querying servers, starting them, putting them to sleep and waking them.

Each failure is logged and counted, and leaves a state that the next operation checks first.
"""

import asyncio
import contextlib
import logging
import math
import time

from vllm_sleep_ascend.client.calls import (
    CallFailed,
    NoServer,
    OutOfMemory,
    TooLate,
    Unreachable,
)
from vllm_sleep_ascend.proxy.launch.launched import Cancelled, Launched
from vllm_sleep_ascend.proxy.metrics import Metrics
from vllm_sleep_ascend.proxy.servers import Operation, Server

logger = logging.getLogger(__name__)

ASK_S = 5.0
"""Seconds that a query may take, so that an unresponsive server delays the others no longer."""

_DEEPENS_AGAIN_S = 300.0  # after a deep sleep that was refused, as by a full disk

_ENDPOINTS_S = 30.0  # that a server which serves may take until its sleep endpoints answer


class Operations:
    """Operations on servers. ``last_wake_s`` is the duration of the last wake."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.last_wake_s = 1.0

    async def learn_models(self, servers: list[Server]) -> None:
        """Query which models the servers have; adapters may have been added."""

        async def learn(server: Server) -> None:
            try:
                server.models = await server.client.models(timeout_s=ASK_S)
            except CallFailed as error:
                if not server.models:
                    logger.warning("models: %s", error)

        await asyncio.gather(*(learn(server) for server in servers if server.runs))

    async def start(self, server: Server, launched: Launched) -> None:
        """Start its process, or wait for one that starts. Requests that wait for it fail if it does
        not serve; after ``Launched.cancel`` they wait for its next start."""
        started, until, awake = time.monotonic(), math.inf, False
        server.state, server.open, server.served = "starting", False, False

        async def serves() -> bool:
            """
            Raises:
                CallFailed: it has no sleep endpoints, so it could never make way.
            """
            nonlocal until, awake
            if not await server.client.serves(ASK_S):
                return False
            launched.check_ports()  # again: another one may have answered, and keys come next
            until = min(until, time.monotonic() + _ENDPOINTS_S)
            try:
                server.models = await server.client.models(timeout_s=ASK_S)
                awake = not await server.client.is_sleeping(timeout_s=ASK_S)
            except (Unreachable, TooLate):
                if time.monotonic() > until:
                    raise
                return False
            return True

        try:
            await launched.start(serves)
        except CallFailed as error:
            server.state = "stuck" if launched.is_stuck else "stopped"
            if isinstance(error, Cancelled):
                return
            if server.due == "preload":
                server.due = "restart"  # which puts no other server to sleep
            self.metrics.failures.labels(server.name, "start").inc()
            server.fail(error)
            return
        server.due = None
        self._took(server, "start", started)
        self.metrics.starts.labels(server.name).inc()
        if server.state == "starting":  # it lives
            server.state, server.awake_since = "awake" if awake else "unknown", time.monotonic()
        for name in server.names:
            if server.models and name not in server.models:
                logger.warning(
                    "%s has no model %r; start it with --served-model-name %s",
                    *(server.name, name, " ".join(server.names)),
                )

    async def ask(self, server: Server) -> CallFailed | None:
        """Query whether it is awake; returns the error if it did not answer.

        A server counts as asleep only after ``sleep``: one that reports it may be partly awake.
        """
        try:
            awake = not await server.client.is_sleeping(timeout_s=ASK_S)
        except CallFailed as error:
            if server.runs and (server.state == "awake" or isinstance(error, NoServer)):
                server.state, server.open = "unknown", False
            return error
        if not server.runs:
            return CallFailed(f"{server.name} has ended")
        if awake and server.state != "awake":
            server.state, server.awake_since = "awake", time.monotonic()
        elif not awake and server.state == "awake":
            server.state, server.open = "unknown", False
        return None

    async def sleep(self, server: Server, deep: bool = False) -> bool:
        """Put it to sleep. Returns whether it holds no device memory: it sleeps, or is gone. A deep
        sleep that it refuses becomes its normal one."""
        if deep and time.monotonic() >= server.deepens_again_at:
            if await self._sleep(server, deep=True):
                return True
            if not server.runs or await self.ask(server) is not None:
                return False
            server.deepens_again_at = time.monotonic() + _DEEPENS_AGAIN_S
        return await self._sleep(server, deep=False)

    async def keeps_running(self, server: Server, lacks_host: bool) -> str:
        """Why one that does not fall asleep is not ended for another; empty if it is.

        Args:
            lacks_host: its sleep needed more host memory than there is.
        """
        if await self.ask(server) is not None or server.state != "awake":
            return ""
        lost = None
        with contextlib.suppress(CallFailed, TimeoutError):
            lost = await asyncio.wait_for(server.client.would_lose(2), ASK_S)
        if lost:
            return f"and its end would lose {lost}, which are in no checkpoint"
        if lacks_host:
            return "because the host has no memory for its backup"
        server.state = "unknown"
        return ""

    async def _sleep(self, server: Server, deep: bool) -> bool:
        server.open = False
        started = time.monotonic()
        try:
            level, place = await self._depth(server, deep)
            # What sleeps already may stay at its level, and lack weights.
            slept_at = max(level, server.slept_at or 0)
            if server.launched is not None:
                server.launched.slept_at = slept_at
            await server.client.sleep(level, mode="wait", discard_trained=True, place=place)
        except CallFailed as error:
            logger.warning("sleep: %s", error)
            if not server.runs:
                return not server.on_device
            server.state = "unknown"
            if isinstance(error, NoServer) or await server.client.is_gone(ASK_S):
                await self._clear(server)
                return not server.on_device  # else its memory is not free yet
            self.metrics.failures.labels(server.name, "sleep").inc()
            return False
        if server.runs:
            server.state, server.slept_at = "asleep", slept_at
            server.deepest, server.outlasted = deep or level == 2, False
        server.sleep_s = self._took(server, "sleep", started)
        self.metrics.sleeps.labels(server.name).inc()
        return not server.on_device

    async def deepen(self, server: Server) -> bool:
        """Have a sleep at level 1 become a deep one, where that frees host memory. Returns true: it
        is not tried again."""
        server.deepest = True  # also after a failure, until its next sleep
        try:
            if not await server.client.frees_host_memory():
                return True
            level, place = await self._depth(server, deep=True)
            if level == 2 or place is not None:
                if server.launched is not None:
                    server.launched.slept_at = level
                await server.client.sleep(level, mode="wait", discard_trained=True, place=place)
                server.slept_at = level
                self.metrics.sleeps.labels(server.name).inc()
        except CallFailed as error:
            logger.warning("deep sleep: %s", error)
            self.metrics.failures.labels(server.name, "sleep").inc()
        return True

    async def _depth(self, server: Server, deep: bool) -> tuple[int, str | None]:
        """The level of its sleep, and where its backup goes, if that is not as its options say."""
        if deep and server.deep_sleep == "disk":
            return 1, "disk"
        return await self._level(server, 2 if deep else server.level), None

    async def _level(self, server: Server, level: int) -> int:
        """The level to use: 1 if level 2 would lose weights for good."""
        lost = await server.client.would_lose(level)
        if lost:
            logger.warning("%s sleeps at level 1: %s are in no checkpoint", server.name, lost)
        return 1 if lost else level

    async def clear_if_gone(self, server: Server) -> None:
        """End what is left of a server that the proxy has started, if its engine is gone."""
        if server.launched is not None and await server.client.is_gone(ASK_S):
            await self._clear(server)

    async def _clear(self, server: Server) -> None:
        """The same for one whose engine is known to be gone."""
        if server.launched is not None:
            await server.launched.kill("its engine is gone")

    async def wake(self, server: Server, beside_others: bool = False) -> None:
        """Wake it, or fail the requests that wait for it. One that found too little memory, though
        it should fit by its bytes, gets its devices to itself, and its requests wait for that."""
        started = time.monotonic()
        try:
            await server.client.wake_to_serve(slept_at=server.slept_at or server.level)
        except CallFailed as error:
            self.metrics.failures.labels(server.name, "wake").inc()
            logger.warning("wake: %s", error)
            if beside_others and isinstance(error, OutOfMemory) and not server.does_not_fit:
                server.does_not_fit = True
            else:
                server.fail(error)
            if server.runs:
                server.state = "unknown"
            await self.clear_if_gone(server)
            return
        if not server.runs:
            server.fail(CallFailed(f"{server.name} has ended"))
            return
        server.state, server.served, server.slept_at = "awake", False, None
        server.does_not_fit = False  # It holds what it takes, and its figures tell that.
        if server.launched is not None:
            server.launched.slept_at = 0
        server.awake_since = time.monotonic()
        self.last_wake_s = server.wake_s = self._took(server, "wake", started)
        self.metrics.switches.labels(server.name).inc()

    def _took(self, server: Server, name: str, started: float) -> float:
        """Note an operation. Returns its seconds."""
        seconds = time.monotonic() - started
        self.metrics.operation.labels(name).observe(seconds)
        server.last_operation = Operation(name, seconds, time.time())
        return seconds
